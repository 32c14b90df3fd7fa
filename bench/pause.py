"""The parent's pause by memory size and by how much of it is being rewritten."""

from bench.console import watching
from bench.session import Session
from bench.splits import record, split_often

SECTION = "pause"
_MEMORY_MIB = (512, 2048, 8192)
_DIRTY_MIB = (0, 64, 256)


async def run(session: Session) -> None:
    """Every size with every amount; a new machine for each, so that all start from the same depth."""
    for memory_mib in (512, 8192) if session.quick else _MEMORY_MIB:
        for dirty_mib in (0, 256) if session.quick else _DIRTY_MIB:
            machine = await session.forky.run(memory_mib=memory_mib)
            assert machine.info.qemu_pid is not None
            with watching(machine.info.qemu_pid) as watch:
                await session.instance.start_program(machine, "ticker")
                if dirty_mib:
                    await session.instance.start_program(machine, "rewriter", str(dirty_mib))
                await watch.ticking()
                splits = await split_often(machine, session.times(20, 3), watch, passes=1 if dirty_mib else 0)
            record(session, SECTION, splits, memory_mib=memory_mib, dirty_mib=dirty_mib)
            await session.instance.clear()
