"""What else a user could do to get a second machine: boot one, or stop and copy a running one with QEMU's own means."""

import shutil
import tempfile
from pathlib import Path

from bench.instance import Instance
from bench.plain import Base, PlainMachine
from bench.processes import calm
from bench.session import Session
from forkypig.images.store import ImageStore
from forkypig.qemu.command import DirectBoot, Hardware

SECTION = "alternatives"
_HELD_MIB = (0, 256)


async def run(session: Session) -> None:
    """Cold boots through Forky Pig; copies by QEMU alone."""
    boots = []
    for _ in range(session.times(5, 2)):
        machine = await session.forky.run(cold_boot=True)
        boots.append(machine.ready_ms or 0.0)
        await session.instance.clear()
    session.tell(session.results.add(SECTION, "cold boot", "ms", boots))
    base = await _base(session.instance)
    directory = Path(tempfile.mkdtemp(prefix="forky-plain-"))
    try:
        await _copies(session, base, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    await calm()


async def _copies(session: Session, base: Base, directory: Path) -> None:
    machine = await PlainMachine.boot(base, directory)
    try:
        has_mapped_ram = "mapped-ram" in await machine.capabilities()
        if not has_mapped_ram:
            session.results.notes.append(
                "mapped-ram was not measured: this QEMU does not have it (it came with QEMU 9.0)."
            )
        for held_mib in _HELD_MIB:
            if held_mib:
                await machine.hold(held_mib)
            await calm()
            await _record(session, machine, "stop-and-copy to a file", held_mib, mapped_ram=False)
            if has_mapped_ram:
                await _record(session, machine, "mapped-ram", held_mib, mapped_ram=True)
            saved = [await machine.savevm() for _ in range(session.times(5, 2))]
            labels: dict[str, str | int] = {"way": "savevm and loadvm", "held_mib": held_mib}
            session.tell(session.results.add(SECTION, "pause", "ms", [each.save_ms for each in saved], **labels))
            session.results.add(SECTION, "goes back in place", "ms", [each.load_ms for each in saved], **labels)
            session.results.add(SECTION, "state file", "MiB", [each.grew_mib for each in saved], **labels)
    finally:
        await machine.end()


async def _record(session: Session, machine: PlainMachine, way: str, held_mib: int, *, mapped_ram: bool) -> None:
    copies = [await machine.copy(mapped_ram=mapped_ram) for _ in range(session.times(5, 2))]
    results = session.results
    labels: dict[str, str | int] = {"way": way, "held_mib": held_mib}
    session.tell(results.add(SECTION, "pause", "ms", [copy.pause_ms for copy in copies], **labels))
    session.tell(results.add(SECTION, "copy runs", "ms", [copy.copy_ms for copy in copies], **labels))
    results.add(SECTION, "state file", "MiB", [copy.file_mib for copy in copies], **labels)


async def _base(here: Instance) -> Base:
    """The image and the hardware that the instance's own machines have."""
    machine = await here.forky.run()
    like = await machine.snapshot()
    await here.clear()
    files = ImageStore(here.settings.images).files(like.image)
    return Base(
        qemu=here.settings.qemu,
        hardware=Hardware(like.machine_type, like.accelerator, like.cpu_model, "user"),
        shape=like.shape,
        boot=DirectBoot(files.kernel, files.initrd, files.cmdline),
        disk=files.disk,
        disk_format=files.disk_format,
    )
