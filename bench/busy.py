"""The pause while other machines keep every core busy, and while snapshots are being packed."""

import asyncio

from bench.console import watching
from bench.instance import instance
from bench.processes import cores
from bench.session import Session
from bench.splits import record, split_often

SECTION = "busy"
PACKING = "packing"
_NEIGHBOURS = 2


async def run(session: Session) -> None:
    """Two neighbours with as many spinning vCPUs each as the host has cores."""
    machine = await session.forky.run()
    neighbours = [await session.forky.run(cpus=cores()) for _ in range(_NEIGHBOURS)]
    for neighbour in neighbours:
        await session.instance.start_program(neighbour, "spinner")
    await asyncio.sleep(2)
    splits = await split_often(machine, session.times(30, 8))
    record(session, SECTION, splits, neighbours=_NEIGHBOURS, spinning_vcpus=_NEIGHBOURS * cores())
    await session.instance.clear()


async def packing(session: Session) -> None:
    """An instance of its own that packs in the background: each split meets the packing of those before."""
    async with instance(pack=True) as other:
        inner = Session(other, session.results, session.quick, session.began)
        machine = await other.forky.run()
        assert machine.info.qemu_pid is not None
        with watching(machine.info.qemu_pid) as watch:
            await other.start_program(machine, "rewriter", "256")
            await other.start_program(machine, "ticker")
            await watch.ticking()
            splits = await split_often(machine, session.times(20, 3), watch, passes=1)
        record(inner, PACKING, splits, dirty_mib=256)
        packed = sum(snapshot.packed for snapshot in await other.forky.snapshots())
        session.results.add(PACKING, "snapshots packed meanwhile", "of all", [packed], splits=len(splits.pause_ms))
