"""A machine without Forky Pig's daemons: QEMU, started and migrated as anyone could, for comparison.

The guest, the devices and the host are those of the other sections; only what copies the machine differs.
"""

import asyncio
import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from bench import qemu_img
from forkypig.errors import MachineFailed
from forkypig.guest.calls import ExecSpec, Exited
from forkypig.guest.channel import GuestChannel, Identity
from forkypig.model import Shape
from forkypig.qemu import priority
from forkypig.qemu.command import CommandLine, DirectBoot, Hardware
from forkypig.qemu.disks import aio_engine
from forkypig.qemu.process import Process

_BOOT_S = 180.0
_MIGRATION_S = 120.0
_EXEC_S = 120.0
_UNLIMITED = 100 << 30  # bytes per second; the default would throttle it
_GUEST = Path(__file__).parent / "guest"


@dataclass(frozen=True, slots=True)
class Base:
    """What a plain machine is booted from."""

    qemu: str
    hardware: Hardware
    shape: Shape
    boot: DirectBoot
    disk: Path
    disk_format: str


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy of a running machine, in ms from the moment at which it was stopped."""

    pause_ms: float  # until the original ran again
    copy_ms: float  # until the copy ran
    file_mib: float  # of state on disk


@dataclass(frozen=True, slots=True)
class SavedVm:
    """A snapshot by QEMU inside the disk's qcow2 file; the machine stands still for both."""

    save_ms: float
    load_ms: float
    grew_mib: float  # of the disk's file


class PlainMachine:
    """One QEMU process with the agent's channel."""

    def __init__(self, base: Base, directory: Path, process: Process, channel: GuestChannel) -> None:
        self._base, self._directory, self._process, self._channel = base, directory, process, channel

    @classmethod
    async def boot(cls, base: Base, directory: Path) -> "PlainMachine":
        """Boots from an overlay and waits for the agent. On failure nothing is left running."""
        disk = directory / "parent.qcow2"
        await qemu_img.create(disk, base.shape.disk_mib, (base.disk, base.disk_format))
        process = await Process.start(directory / "parent", _command(base, "plain-parent", disk, base.boot))
        channel = GuestChannel("the plain machine")
        try:
            identity = Identity("plain", os.urandom(16).hex())
            await channel.open(directory / "parent/agent.sock", identity=identity, orphans="kill", deadline_s=_BOOT_S)
        except BaseException:
            await process.kill()
            raise
        return cls(base, directory, process, channel)

    async def end(self) -> None:
        """Ends it."""
        await self._channel.close()
        await self._process.kill()

    async def exec(self, *argv: str) -> None:
        """Runs a command. Raises MachineFailed when it fails."""
        async with asyncio.timeout(_EXEC_S):
            async for event in await self._channel.exec(ExecSpec(argv=argv)):
                if isinstance(event, Exited) and event.code != 0:
                    raise MachineFailed(f"{argv[0]} failed in the plain machine: {event.code} {event.failure}")

    async def hold(self, mib: int) -> None:
        """Has a program in the guest fill and keep so much memory."""
        program = (_GUEST / "toucher.py").read_text()
        await self.exec("sh", "-c", 'setsid python3 -c "$0" "$1" </dev/null >/dev/null 2>&1 &', program, str(mib))
        await self.exec("sh", "-c", "until [ -e /run/touched ]; do sleep 0.1; done")

    async def capabilities(self) -> set[str]:
        """What this QEMU's migration can do."""
        answer = await self._process.session.execute("query-migrate-capabilities")
        return {capability["capability"] for capability in answer}

    async def savevm(self) -> SavedVm:
        """savevm, loadvm, delvm. Raises MachineFailed."""
        disk = self._directory / "parent.qcow2"
        before = disk.stat().st_blocks
        began = time.perf_counter()
        await self._monitor("savevm bench")
        saved = time.perf_counter()
        grew = disk.stat().st_blocks - before
        await self._monitor("loadvm bench")
        loaded = time.perf_counter()
        await self._monitor("delvm bench")
        return SavedVm((saved - began) * 1000, (loaded - saved) * 1000, grew * 512 / (1 << 20))

    async def _monitor(self, line: str) -> None:
        """A command of the human monitor; these have no other form in QEMU 7.2. They print errors, and succeed."""
        said = await self._process.session.execute(
            "human-monitor-command", {"command-line": line}, timeout_s=_MIGRATION_S
        )
        if said.strip():
            raise MachineFailed(f"{line} failed in the plain machine: {said.strip()}")

    async def copy(self, *, mapped_ram: bool) -> Copied:
        """Stop, write all to a file, go on; then a second QEMU, started ahead, loads the file and runs."""
        disk, state = self._directory / "copy.qcow2", self._directory / "state"
        shutil.copyfile(self._directory / "parent.qcow2", disk)  # read again when the copy activates it
        state.unlink(missing_ok=True)
        state.touch(mode=0o600)
        copy = await Process.start(self._directory / "copy", _command(self._base, "plain-copy", disk, None))
        try:
            priority.foreground(copy.pid)
            for process in (self._process, copy):
                await _prepare(process, mapped_ram=mapped_ram)
            began = time.perf_counter()
            await self._process.session.execute("stop")
            await _migrate(self._process, state, incoming=False, mapped_ram=mapped_ram)
            # The disk as it is now: by the migration's end it is flushed and released.
            await asyncio.to_thread(shutil.copyfile, self._directory / "parent.qcow2", disk)
            await self._process.session.execute("cont")
            paused = time.perf_counter()
            await _migrate(copy, state, incoming=True, mapped_ram=mapped_ram)
            await copy.session.execute("cont")  # the state says that its machine was stopped
            ran = time.perf_counter()
            return Copied((paused - began) * 1000, (ran - began) * 1000, state.stat().st_blocks * 512 / (1 << 20))
        finally:
            await copy.kill()


def _command(base: Base, process_id: str, disk: Path, boot: DirectBoot | None) -> CommandLine:
    return CommandLine(
        qemu=base.qemu,
        process_id=process_id,
        hardware=base.hardware,
        shape=base.shape,
        disks=[(disk, "qcow2"), (base.disk, base.disk_format)],
        aio=aio_engine(),
        console=disk.with_suffix(".log"),
        memory=None,
        boot=boot,
    )


async def _prepare(process: Process, *, mapped_ram: bool) -> None:
    capabilities = [{"capability": "events", "state": True}]
    if mapped_ram:
        capabilities.append({"capability": "mapped-ram", "state": True})
    await process.session.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await process.session.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})


async def _migrate(process: Process, state: Path, *, incoming: bool, mapped_ram: bool) -> None:
    """To the file, until all is written; or from it, until all is loaded."""
    command = "migrate-incoming" if incoming else "migrate"
    with process.session.events("MIGRATION") as events, contextlib.ExitStack() as stack:
        uri = f"file:{state}"
        if not mapped_ram:  # `file:` came with QEMU 8.2; a descriptor works with all
            fd = os.open(state, (os.O_RDONLY if incoming else os.O_WRONLY) | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            await process.session.send_descriptor(fd, "state")
            uri = "fd:state"
        await process.session.execute(command, {"uri": uri})
        while True:
            status = (await events.next(_MIGRATION_S))["data"]["status"]
            if status == "failed":
                raise MachineFailed(f"{command} of the plain machine failed")
            if status == "completed":
                break
    # The event comes a moment before QEMU would take `cont`.
    while (await process.session.execute("query-status"))["status"] == "finish-migrate":  # noqa: ASYNC110 - no event says it
        await asyncio.sleep(0.0005)
