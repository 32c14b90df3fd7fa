"""Folding: when a snapshot is packed, machines on its overlay get its disk from the pager, and the overlay goes.

A machine's disk is one overlay over one raw file again then, however many generations there were. What can't be done
at once (a shell that waits, a process that does not answer) is tried again; nothing but space depends on it.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError
from forkypig.hostd.disk_chains import Chain
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import SnapshotPhase
from forkypig.model import MachineState
from forkypig.qemu import disks
from forkypig.qemu.fold import fold
from forkypig.qemu.process import is_frozen

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

_AGAIN_S = 10.0


class Folding:
    """Brings disks to what the records say, one pass at a time."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    def soon(self) -> None:
        """Something was packed, or a machine has started: looks at all machines in the background."""
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = self._host.spawn(self._until_done(), "fold")

    def is_straight(self, live: LiveMachine) -> bool:
        """Whether the machine's process has the layers that the records say; also where none runs, or the records don't
        say any (one can't be read): then it stays as it is."""
        process = live.process
        if process is None:
            return True
        try:
            chain = self._chain(live)
        except ForkyError as error:
            log.error("it is not known what a disk stands on", machine=live.id, error=str(error))
            return True
        return process.disks is not None and list(process.disks) == list(chain)

    def _chain(self, live: LiveMachine) -> Chain:
        machine = live.record.machine
        return [(live.record.disk, "qcow2"), *self._host.chains.below(machine.snapshot, machine.image)]

    async def _until_done(self) -> None:
        while self._wanted:
            self._wanted = False
            if not await self._all():
                self._wanted = True
                await asyncio.sleep(_AGAIN_S)

    async def _all(self) -> bool:
        """Folds what can be folded and removes what nobody needs; whether nothing was left."""
        done = True
        for live in list(self._host.machines.values()):
            try:
                done = await self._one(live) and done
            except (ForkyError, OSError) as error:
                done = False
                log.warning("a disk was not folded", machine=live.id, error=str(error))
        for overlay in list(self._unneeded()):
            await asyncio.to_thread(overlay.unlink, missing_ok=True)
            log.info("overlay removed", path=overlay.name)
        return done and not any(overlay.exists() for overlay in self._packed_overlays())

    async def _one(self, live: LiveMachine) -> bool:
        if self.is_straight(live):
            return True
        if live.state not in (MachineState.RUNNING, MachineState.PAUSED) or live.process is None:
            return False
        process = live.process
        await asyncio.to_thread(disks.write_back, live.record.disk)
        async with process.disks_lock:
            if live.process is not process or is_frozen(process.pid):
                return self.is_straight(live)
            began = asyncio.get_running_loop().time()
            await fold(process, self._chain(live))
        took_ms = round((asyncio.get_running_loop().time() - began) * 1000, 1)
        log.info("folded", machine=live.id, layers=len(self._chain(live)), took_ms=took_ms)
        return True

    async def open_again(self, live: LiveMachine) -> None:
        """The packed disk that a machine stands on is another file with the same name and content: the pager has begun
        anew. Does nothing for one on an image's disk. Raises MachineFailed, NotPossibleNow."""
        process, chain = live.process, self._chain(live)
        if process is None or not chain[-1][0].is_relative_to(self._host.settings.memory):
            return
        async with process.disks_lock:
            if live.process is process:
                await fold(process, chain, anew=True)

    def _packed_overlays(self) -> Iterator[Path]:
        for record in list(self._host.snapshots.values()):
            if record.phase is SnapshotPhase.PACKED:
                yield record.disk

    def _unneeded(self) -> Iterator[Path]:
        """Overlays of packed snapshots that no process has open or is about to open."""
        processes = [live.process for live in self._host.machines.values() if live.process is not None]
        if any(process.disks is None for process in processes):
            return  # an earlier hostd's, which has not been looked at yet
        in_use = {path for process in processes for path, _ in process.disks or ()}
        for overlay in self._packed_overlays():
            if overlay not in in_use and not self._host.chains.is_being_opened(overlay) and overlay.exists():
                yield overlay
