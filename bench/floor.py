"""The floor of fanning out: what it costs the host to start QEMU processes that do nothing at all.

A shell is started with the very command line of a child, on an empty disk and on memory that holds nothing, until its
monitor answers. Its CPU time times the number of children, shared among the cores, is a time that no fan-out on this
QEMU can beat without starting shells ahead.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path

from bench import qemu_img
from bench.instance import Instance
from bench.processes import cores, cpu_ms
from bench.session import Session
from forkypig.model import Snapshot
from forkypig.qemu.command import CommandLine, Hardware
from forkypig.qemu.disks import aio_engine
from forkypig.qemu.process import Process

SECTION = "floor"


async def run(session: Session) -> None:
    """Starts shells side by side, as many at a time as there are cores, and keeps them all until the end."""
    machine = await session.forky.run()
    like = await machine.snapshot()
    await session.instance.clear()
    count = session.times(50, 10)
    directory = Path(tempfile.mkdtemp(prefix="forky-floor-"))
    shells: list[Process] = []
    try:
        (directory / "memory").touch()
        with (directory / "memory").open("r+b") as file:
            file.truncate(like.shape.memory_mib << 20)
        await qemu_img.create(directory / "disk.qcow2", like.shape.disk_mib)
        turns = asyncio.Semaphore(cores())
        commands = [_command(directory, number, like, session.instance) for number in range(count)]
        spent = await asyncio.gather(*(_start(turns, directory, command, shells) for command in commands))
    finally:
        await asyncio.gather(*(shell.kill() for shell in shells))
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    session.tell(session.results.add(SECTION, "CPU time of a bare shell", "ms", spent, shells=count))


async def _start(turns: asyncio.Semaphore, directory: Path, command: CommandLine, shells: list[Process]) -> float:
    """Starts one shell and returns the CPU time, in ms, that it has used when its monitor answers."""
    async with turns:
        shell = await Process.start(directory / command.process_id, command)
        spent = cpu_ms(shell.pid)
        shells.append(shell)
        return spent


def _command(directory: Path, number: int, like: Snapshot, here: Instance) -> CommandLine:
    """A child's command line; each shell has a disk of its own, as children do."""
    disk = directory / f"{number}.qcow2"
    shutil.copyfile(directory / "disk.qcow2", disk)
    return CommandLine(
        qemu=here.settings.qemu,
        process_id=f"floor-{number}",
        hardware=Hardware(like.machine_type, like.accelerator, like.cpu_model, "user"),
        shape=like.shape,
        disks=[(disk, "qcow2")],
        aio=aio_engine(),
        console=directory / f"{number}.log",
        memory=directory / "memory",
        boot=None,
    )


def floor_ms(shell_ms: list[float], children: int) -> float:
    """The floor for so many children on this host, in ms."""
    return children * sum(shell_ms) / len(shell_ms) / cores()
