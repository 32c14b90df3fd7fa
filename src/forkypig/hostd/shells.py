"""Shells: QEMU processes that wait for device state. Made here, for forks and for the small pool per template."""

import asyncio
import contextlib
import os
import secrets
import shutil
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import structlog

from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.hostd import faults
from forkypig.hostd.disk_chains import DiskChains
from forkypig.hostd.network import HostNetwork
from forkypig.hostd.records import SnapshotRecord
from forkypig.model import ImageId, Shape, SnapshotId
from forkypig.net.slot import Slot
from forkypig.qemu import disks, priority, split
from forkypig.qemu.command import CommandLine, DirectBoot, Hardware
from forkypig.qemu.process import Place, Process

log = structlog.get_logger()

# Pools of the templates used last are kept; a shell that waits costs some 25 MiB of its own.
_POOLS = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """The files of one QEMU process, all named after its id."""

    process_id: str
    directory: Path
    disk: Path
    console: Path

    def discard_process(self) -> None:
        """The process has ended: removes its sockets and its log. The disk and the console may live on."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def discard(self) -> None:
        """Removes all but the console, which may be its machine's."""
        self.discard_process()
        with contextlib.suppress(OSError):
            self.disk.unlink(missing_ok=True)


Release = Callable[[Slot | None], Awaitable[None]]


@dataclass(slots=True)
class Shell:
    """A QEMU process, its parts, and what it was started for."""

    process: Process
    parts: Parts
    console: Path
    generation_id: uuid.UUID
    slot: Slot | None = None
    release: Release | None = None  # gives the slot back, where it is the shell's own

    async def discard(self) -> None:
        """Ends it and removes its files."""
        await self.process.kill()
        self.parts.discard()
        if self.release is not None:
            await self.release(self.slot)
        if self.console == self.parts.console:
            with contextlib.suppress(OSError):
                self.console.unlink(missing_ok=True)


class ShellMaker:
    """Starts QEMU processes."""

    def __init__(self, settings: Settings, network: HostNetwork, chains: DiskChains) -> None:
        self.settings, self.network, self.chains = settings, network, chains
        self.overlays = disks.Overlays(settings.home / "blanks")

    def new_parts(self) -> Parts:
        """Fresh names; nothing is made yet."""
        process_id = f"q-{secrets.token_hex(4)}"
        return self.parts(process_id)

    def parts(self, process_id: str) -> Parts:
        """The files of a process by its id."""
        home = self.settings.home
        return Parts(
            process_id,
            home / "qemu" / process_id,
            home / "disks" / f"{process_id}.qcow2",
            home / "consoles" / f"{process_id}.log",
        )

    async def new_overlay(self, parts: Parts, shape: Shape, image: ImageId, snapshot: SnapshotId | None) -> None:
        """Makes `parts.disk`, empty, on a snapshot's disk (None: on the image's). Raises ResourceExhausted."""
        backing, backing_format = self.chains.below(snapshot, image)[0]
        await self.overlays.create(parts.disk, backing=backing, backing_format=backing_format, size_mib=shape.disk_mib)

    async def start(
        self,
        parts: Parts,
        *,
        hardware: Hardware,
        shape: Shape,
        image: ImageId,
        snapshot: SnapshotId | None,
        memory: Path | None,
        boot: DirectBoot | None = None,
        paused: bool = False,
        console: Path | None = None,
        generation_id: uuid.UUID | None = None,
        slot: Slot | None = None,
    ) -> Shell:
        """Starts QEMU on an overlay that is there and stands on `snapshot` (None: on the image itself), in the
        machine's `slot` or, without one, in a new slot of its own.

        On failure the disk stays and the rest is removed.
        """
        async with contextlib.AsyncExitStack() as undo:
            release: Release | None = None
            if slot is None and (slot := await self.network.take()) is not None:
                release = self.network.release
                undo.push_async_callback(release, slot)
            tap_fd, place = -1, cast(Place, contextlib.nullcontext)
            if slot is not None:
                place = slot.inside
                tap = await slot.open_tap(parts.process_id)
                tap_fd = tap.fd
                undo.callback(os.close, tap_fd)
                if release is not None:
                    slot.switch(tap.name)  # it is the only one in there
            command = CommandLine(
                qemu=self.settings.qemu,
                process_id=parts.process_id,
                hardware=hardware,
                shape=shape,
                disks=[(parts.disk, "qcow2"), *self.chains.below(snapshot, image)],
                console=console or parts.console,
                aio=disks.aio_engine(),
                memory=memory,
                boot=boot,
                paused=paused,
                generation_id=generation_id or uuid.uuid4(),
            )
            undo.callback(parts.discard_process)
            # Beside QEMU's start, which takes longer. What the guest syncs is in vain without the overlay's own header.
            syncing = asyncio.create_task(asyncio.to_thread(disks.sync, parts.disk))
            undo.push_async_callback(asyncio.wait, {syncing})
            with self.chains.opening(command.disks):
                process = await Process.start(parts.directory, command, tap_fd, place)
            undo.push_async_callback(process.kill)
            await syncing
            undo.pop_all()
            if tap_fd >= 0:
                os.close(tap_fd)  # QEMU has it now; the tap goes with the last one who has
            return Shell(process, parts, command.console, command.generation_id, slot, release)

    async def for_snapshot(
        self, record: SnapshotRecord, memory: Path, *, console: Path | None = None, slot: Slot | None = None
    ) -> Shell:
        """A shell with its device state offered, ready to load: what a child is made from. `console` and `slot`: those
        of a machine that goes on in it."""
        parts = self.new_parts()
        faults.reach("child-overlay")
        async with contextlib.AsyncExitStack() as undo:
            await self.new_overlay(parts, record.snapshot.shape, record.snapshot.image, record.snapshot.id)
            undo.callback(parts.discard)
            faults.reach("child-shell")
            shell = await self.start(
                parts,
                hardware=record.hardware,
                shape=record.snapshot.shape,
                image=record.snapshot.image,
                snapshot=record.snapshot.id,
                memory=memory,
                console=console,
                slot=slot,
            )
            undo.push_async_callback(shell.discard)
            if self.chains.is_packed(record.snapshot.id):
                devices = self.chains.packed_devices(record.snapshot.id)
                await split.offer_state(shell.process, devices, packed=True)
            else:
                await split.offer_state(shell.process, record.devices)
            priority.foreground(shell.process.pid)
            undo.pop_all()
            return shell


class ShellPool:
    """Shells kept ready per template, refilled in the background."""

    def __init__(self, maker: ShellMaker, size: int) -> None:
        self._maker, self._size = maker, size
        self._ready: dict[SnapshotId, list[Shell]] = {}
        self._filling: dict[SnapshotId, asyncio.Task[None]] = {}

    async def take(self, snapshot: SnapshotId) -> Shell | None:
        """A ready shell, or None. One that has died meanwhile is passed over."""
        shells = self._ready.get(snapshot, [])
        while shells:
            shell = shells.pop(0)
            if not shell.process.ended.is_set():
                return shell
            await shell.discard()
        return None

    def refill(self, record: SnapshotRecord, memory: Path) -> None:
        """Begins to fill the pool of a template."""
        snapshot = record.snapshot.id
        if self._size <= 0 or snapshot in self._filling:
            return
        task = asyncio.create_task(self._fill(record, memory), name=f"shells-{snapshot}")
        self._filling[snapshot] = task
        task.add_done_callback(lambda _: self._filling.pop(snapshot, None))

    async def _fill(self, record: SnapshotRecord, memory: Path) -> None:
        shells = self._ready.pop(record.snapshot.id, [])
        self._ready[record.snapshot.id] = shells  # the one used last stands last
        for oldest in list(self._ready)[:-_POOLS]:
            await self.drop(oldest)
        try:
            while len(shells) < self._size and self._ready.get(record.snapshot.id) is shells:
                shells.append(await self._maker.for_snapshot(record, memory))
        except ForkyError as error:
            log.warning("no shell for the pool", snapshot=record.snapshot.id, error=str(error))

    async def renew(self, record: SnapshotRecord, memory: Path) -> None:
        """A template was packed: its shells, which stand on the files that it was, make room for new ones."""
        if record.snapshot.id in {*self._ready, *self._filling}:
            await self.drop(record.snapshot.id)
            self.refill(record, memory)

    async def drop(self, snapshot: SnapshotId) -> None:
        """Ends the shells of one template."""
        filling = self._filling.get(snapshot)
        if filling is not None and filling is not asyncio.current_task():
            filling.cancel()
            await asyncio.wait({filling})
        for shell in self._ready.pop(snapshot, []):
            await shell.discard()

    async def close(self) -> None:
        """Ends all of them."""
        for snapshot in {*self._ready, *self._filling}:
            await self.drop(snapshot)
