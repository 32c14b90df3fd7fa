"""The host's state: which machines and snapshots are here, and what belongs to each.

Operations are in modules of their own (boot, fork, children, lifecycle, packing, adopt), as functions on this.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from forkypig.daemon.settings import Settings
from forkypig.errors import AlreadyExists, ForkyError, NotFound, NotPossibleNow
from forkypig.guest.channel import GuestChannel
from forkypig.hostd import full_disk
from forkypig.hostd.cgroups import search as cgroup_search
from forkypig.hostd.cgroups.cgroups import Cgroups
from forkypig.hostd.disk_chains import DiskChains
from forkypig.hostd.folding import Folding
from forkypig.hostd.ksm import Ksm
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.needs import Here, check_loadable
from forkypig.hostd.network import HostNetwork, give_up, instance_of
from forkypig.hostd.records import MachineRecord, SnapshotPhase, SnapshotRecord, machine_ledger, snapshot_ledger
from forkypig.hostd.shells import ShellMaker, ShellPool
from forkypig.images.store import ImageStore
from forkypig.model import (
    ImageId,
    Machine,
    MachineId,
    MachineState,
    NetworkPolicy,
    Progress,
    Restart,
    SnapshotId,
    SnapshotKind,
)
from forkypig.pager.client import PagerClient
from forkypig.qemu import cpu
from forkypig.qemu.accelerator import Accelerator, QemuBuild
from forkypig.qemu.command import Hardware
from forkypig.qemu.process import Process, last_words

log = structlog.get_logger()

# A daemon is killed some time after it was asked to end; what is in the middle then is taken up by adoption.
_OPERATIONS_END_S = 5.0
_LAST_OPERATIONS_S = 120.0  # a fork of a hundred children on two cores takes seconds
_MOVE_TIMEOUT_S = 10.0  # the channel itself moves in a millisecond


class Host:
    """One computer's machines and snapshots."""

    no_generation = UUID(int=0)

    def __init__(
        self, settings: Settings, build: QemuBuild | None, accelerator: Accelerator | None, pager: PagerClient
    ) -> None:
        """`build` and `accelerator` are None where there is no usable QEMU: then nothing can be started."""
        self.settings, self.pager = settings, pager
        self._build, self._accelerator = build, accelerator
        for directory in (settings.home / "qemu", settings.home / "disks", settings.home / "consoles"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.images = ImageStore(settings.images)
        self.machines: dict[MachineId, LiveMachine] = {}
        self.snapshots: dict[SnapshotId, SnapshotRecord] = {}
        self.frozen: dict[SnapshotId, Process] = {}
        self.machine_ledger = machine_ledger(settings.home)
        self.snapshot_ledger = snapshot_ledger(settings.home)
        self.network = HostNetwork(settings)
        self.groups = Cgroups.find(instance_of(settings), settings.home)
        self.memory_groups = cgroup_search.around(instance_of(settings), cgroup_search.Surroundings())
        self.chains = DiskChains(settings, self.images, self.snapshots)
        self.maker = ShellMaker(settings, self.network, self.chains)
        self.pool = ShellPool(self.maker, settings.shells)
        # A birth keeps a core busy all along, and a little more keeps the cores busy while one waits.
        self.births = asyncio.Semaphore((os.cpu_count() or 1) + 1)
        self.background_births = asyncio.Semaphore(1)  # of their own: who waits must not wait for one that stands back
        self.packing: dict[SnapshotId, asyncio.Task[None]] = {}
        self.packing_turn = asyncio.Lock()
        self.packed_so_far = SnapshotId(""), Progress("")  # what has the turn, or had it last
        self.folding = Folding(self)
        self.ksm = Ksm(settings.home / "ksm.json")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._operations: set[asyncio.Task[Any]] = set()
        self._watchers: set[asyncio.Queue[Machine]] = set()
        self.ending = False  # no machine begins any more

    # -- what it runs on -----------------------------------------------------------------------------------------

    @property
    def build(self) -> QemuBuild:
        """Raises NotPossibleNow where QEMU is missing."""
        if self._build is None:
            raise NotPossibleNow("there is no usable QEMU on this host: `forky doctor` says what to do")
        return self._build

    @property
    def qemu_build(self) -> str:
        return self.build.build_id

    @property
    def accelerator(self) -> Accelerator:
        if self._accelerator is None:
            raise NotPossibleNow("there is no usable QEMU on this host: `forky doctor` says what to do")
        return self._accelerator

    @property
    def accelerator_reason(self) -> str:
        return self._accelerator.reason if self._accelerator is not None else ""

    @property
    def usable(self) -> bool:
        """Whether machines can be started here."""
        return self._build is not None and self._accelerator is not None

    @property
    def build_if_any(self) -> QemuBuild | None:
        return self._build

    @property
    def accelerator_if_any(self) -> Accelerator | None:
        return self._accelerator

    def hardware(self) -> Hardware:
        """What a machine that boots now is made of."""
        return Hardware(
            machine_type=self.build.machine_type,
            accelerator=self.accelerator.name,
            cpu_model=self.accelerator.cpu_model,
            network=self.network.hardware,
            mtu=self.settings.mtu,
        )

    def check_loadable(self, record: SnapshotRecord) -> None:
        """Raises NotPossibleNow, with the reason, where this host can't load the snapshot."""
        hardware = self.hardware()
        seen = cpu.seen_with(hardware.cpu_model)
        here = Here(self.qemu_build, hardware, self.accelerator_reason, self.network.reason, seen)
        check_loadable(record, here)

    # -- machines ------------------------------------------------------------------------------------------------

    def machine(self, machine: str) -> LiveMachine:
        """The machine with this id, or NotFound."""
        live = self.machines.get(MachineId(machine))
        if live is None:
            raise NotFound("machine", machine)
        return live

    def new_machine(self, record: MachineRecord) -> LiveMachine:
        """Takes up a machine and writes it down. Raises NotPossibleNow while all of them are ended."""
        if self.ending:
            raise NotPossibleNow("Forky Pig is being shut down, so no machine can begin: when it has ended, forky up")
        if record.machine.id in self.machines:
            raise AlreadyExists("machine", record.machine.id)
        live = LiveMachine(record, self.machine_saver)
        self.machine_saver(live)
        self.machines[live.id] = live
        return live

    def machine_saver(self, live: LiveMachine) -> None:
        """Writes a machine down and tells the watchers, these also when the disk is full."""
        try:
            self.machine_ledger.save(live.id, live.record)
        finally:
            for watcher in self._watchers:
                watcher.put_nowait(live.view())

    async def settle(self, live: LiveMachine) -> None:
        """What the machine's record says outlasts a power cut from here on, and what that needs: its disk is made of
        the layers of these snapshots. For what is reported as done, where a machine is to be found again without its
        QEMU."""
        below: list[SnapshotId] = []
        with contextlib.suppress(NotPossibleNow):  # a layer that is gone needs no record
            below.extend(record.snapshot.id for record in self.chains.unpacked(live.record.machine.snapshot))
        if below:
            await asyncio.to_thread(self.snapshot_ledger.sync, *below)
        await asyncio.to_thread(self.machine_ledger.sync, live.id)

    async def started(self, live: LiveMachine) -> None:
        """A machine runs and is about to be reported: one that is to come back must be found after a power cut."""
        if live.record.machine.config.restart is Restart.ALWAYS:
            await self.settle(live)

    async def end_machine(self, live: LiveMachine) -> None:
        """Cuts a machine's power."""
        self.unwatch(live)
        await live.close_channel()
        process, live.process = live.process, None
        if process is not None:
            await process.kill()
        await live.leave_group()
        live.update(MachineState.STOPPED)

    async def discard_machine(self, live: LiveMachine) -> None:
        """Ends a machine and removes all that is its own. Safe to call at any stage, and twice."""
        self.unwatch(live)
        await live.close_channel()
        process, live.process = live.process, None
        if process is not None:
            await process.kill()
        record = live.record
        own = [record.disk, record.console] if record.process_id else []
        if record.process_id:
            self.maker.parts(record.process_id).discard_process()
        elif record.console != record.disk:  # it hibernated: the disk is its snapshot's
            own = [record.console]
        for path in own:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        await give_up(self.network, live)
        await live.leave_group()
        self.machine_ledger.delete(live.id)
        self.machines.pop(live.id, None)
        live.removed.set()
        gone = replace(live.record.machine, state=MachineState.REMOVING)
        for watcher in self._watchers:
            watcher.put_nowait(gone)

    async def limit(self, live: LiveMachine, process: Process) -> None:
        """The machine's process joins the machine's cgroup, which is made if it is not there.

        Raises ResourceExhausted, MachineFailed, InvalidRequest.
        """
        machine, accelerator = live.record.machine, live.record.hardware.accelerator
        if live.group is None:
            live.group = await asyncio.to_thread(
                self.groups.make, live.id, machine.config.limits, machine.shape, accelerator
            )
        await asyncio.to_thread(live.group.add, process.pid)

    def watch(self, live: LiveMachine) -> None:
        """From here on the end of the machine's QEMU is noticed."""
        process = live.process
        assert process is not None
        process.on_end = lambda: self.spawn(self._has_ended(live, process), f"ended-{live.id}")
        self.spawn(full_disk.watch(self, live, process), f"full-disk-{live.id}")
        if process.ended.is_set():
            process.on_end()
        if self.ksm.is_on(live.tenant):
            self.spawn(self.ksm.apply(live), f"ksm-{live.id}")
        if not self.folding.is_straight(live):  # it was started before what it stands on was packed
            self.folding.soon()

    def unwatch(self, live: LiveMachine) -> None:
        if live.process is not None:
            live.process.on_end = None

    async def _has_ended(self, live: LiveMachine, process: Process) -> None:
        """QEMU ended by itself: the guest powered off (QEMU then exits in peace) or something killed it."""
        if live.process is not process:
            return
        live.process = None
        await live.close_channel()
        await process.session.close()
        starved = live.group is not None and (live.group.usage().oom_kills or 0) > 0
        await live.leave_group()
        if process.shut_down:
            live.update(MachineState.STOPPED)
        else:
            words = "the host killed it at its memory limit" if starved else last_words(process.directory)
            live.update(
                MachineState.FAILED,
                failure=f"its QEMU process {process.pid} ended unexpectedly ({words}); "
                f"`forky start {live.name}` boots it again from its disk",
            )

    async def move_channel(self, live: LiveMachine) -> None:
        """The agent's channel goes over to the successor. Where that fails it is opened afresh."""
        if live.channel is None:
            return
        try:
            async with asyncio.timeout(_MOVE_TIMEOUT_S):
                await live.channel.move()
        except (ForkyError, OSError, TimeoutError) as error:
            log.warning("channel did not move", machine=live.id, error=str(error))
            await live.close_channel()
            self.find_agent(live)

    def find_agent(self, live: LiveMachine) -> None:
        """Begins to look for the agent of a machine that runs; who wants to speak to it waits for the outcome."""
        live.finding_agent = self.spawn(self._reopen_channel(live), f"reopen-{live.id}")

    async def _reopen_channel(self, live: LiveMachine) -> None:
        process = live.process
        if process is None:
            return
        channel = GuestChannel(live.id)
        try:
            await channel.open(process.directory / "agent.sock", identity=None, orphans="kill", deadline_s=60.0)
        except (ForkyError, OSError) as error:
            log.warning("agent does not answer", machine=live.id, error=str(error))
            await channel.close()
            return
        except BaseException:  # nobody looks for it any more
            await channel.close()
            raise
        live.channel = channel

    async def watch_machines(self) -> AsyncIterator[Machine]:
        """All machines as they are, and then each as it changes; REMOVING is the last of one."""
        queue: asyncio.Queue[Machine] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for live in list(self.machines.values()):
                yield live.view()
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    # -- what the name server asks -------------------------------------------------------------------------------

    def address_of(self, name: str, asker: IPv4Address) -> IPv4Address | None:
        """Where the machine of this name is reached, among those of the tenant that the asking machine is of."""
        asking = self._at(asker)
        for live in self.machines.values():
            if live.name == name and live.slot is not None and asking is not None and live.tenant == asking.tenant:
                return live.slot.address
        return None

    def _at(self, address: IPv4Address) -> LiveMachine | None:
        for live in self.machines.values():
            if live.slot is not None and live.slot.address == address:
                return live
        return None

    def name_of(self, address: IPv4Address, asker: IPv4Address) -> str | None:
        """The name of the machine at this address, if it is of the asking machine's tenant."""
        live, asking = self._at(address), self._at(asker)
        return live.name if live is not None and asking is not None and live.tenant == asking.tenant else None

    def policy_of(self, address: IPv4Address) -> NetworkPolicy | None:
        """What the machine at this address may do."""
        live = self._at(address)
        return live.record.machine.config.network if live is not None else None

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self, snapshot: str) -> SnapshotRecord:
        """The snapshot with this id, or NotFound."""
        record = self.snapshots.get(SnapshotId(snapshot))
        if record is None:
            raise NotFound("snapshot", snapshot)
        return record

    def save_snapshot(self, record: SnapshotRecord) -> None:
        """Writes a snapshot down. Raises ResourceExhausted; it is then not known, or as it was."""
        self.snapshot_ledger.save(record.snapshot.id, record)
        self.snapshots[record.snapshot.id] = record

    def drop_snapshot_record(self, snapshot: SnapshotId) -> None:
        """Forgets a snapshot and its device state."""
        self.snapshots.pop(snapshot, None)
        self.snapshot_ledger.delete(snapshot)
        self.devices_path(snapshot).unlink(missing_ok=True)

    def keep_frozen(self, record: SnapshotRecord, process: Process) -> None:
        """A process was frozen for this snapshot. If it ends before it is packed the snapshot is lost."""
        snapshot = record.snapshot.id
        self.snapshots[snapshot] = record
        self.frozen[snapshot] = process
        process.on_end = lambda: self.lose(snapshot)

    def lose(self, snapshot: SnapshotId) -> None:
        """The memory of a snapshot is nowhere any more. Its disk stays, for what stands on it."""
        self.frozen.pop(snapshot, None)
        record = self.snapshots.get(snapshot)
        if record is not None and record.phase is not SnapshotPhase.LOST:
            log.error("a snapshot is lost: its frozen process has ended", snapshot=snapshot)
            with contextlib.suppress(ForkyError):  # no room for the record; the next hostd finds out by itself
                self.save_snapshot(replace(record, phase=SnapshotPhase.LOST))

    def devices_path(self, snapshot: SnapshotId) -> Path:
        """The file with its device state."""
        return self.settings.snapshots / f"{snapshot}.devices"

    def memory_path(self, snapshot: SnapshotId) -> Path:
        """The pager's file with its memory."""
        return self.settings.memory / snapshot / "memory"

    async def forget_memory(self, snapshot: SnapshotId) -> None:
        try:
            await self.pager.forget(snapshot)
        except ForkyError as error:
            log.warning("pager did not forget", snapshot=snapshot, error=str(error))

    def end_of_load(self, snapshot: SnapshotId) -> None:
        self.spawn(self._end_of_load(snapshot), f"end-of-load-{snapshot}")

    async def _end_of_load(self, snapshot: SnapshotId) -> None:
        try:
            await self.pager.end_of_load(snapshot)
        except ForkyError as error:
            log.warning("pager did not end the recording", snapshot=snapshot, error=str(error))

    def split_pids(self) -> tuple[int, ...]:
        """Our own processes that a split waits for."""
        return (os.getpid(), *self.pager.pids)

    def refill_pool(self, record: SnapshotRecord) -> None:
        """Keeps shells ready for a template that was just used."""
        if record.snapshot.kind is SnapshotKind.TEMPLATE:
            self.pool.refill(record, self.memory_path(record.snapshot.id))

    def check_image_unused(self, image: ImageId) -> None:
        """Raises NotPossibleNow while a machine or a snapshot stands on the image's disk."""
        by = [live.name for live in self.machines.values() if live.record.machine.image == image]
        by += [record.snapshot.id for record in self.snapshots.values() if record.snapshot.image == image]
        if by:
            raise NotPossibleNow(f"image {image} is needed by {', '.join(by[:5])}: remove these first")

    # -- tasks ---------------------------------------------------------------------------------------------------

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Holds an operation that somebody else awaits, so that it goes on to its end when they go away."""
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs `work` in the background; what it raises is logged."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._log_failure)
        return task

    def _log_failure(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("background task failed", task=task.get_name(), exc_info=task.exception())

    async def begin_end(self) -> None:
        """From here on no machine begins; waits for those that are on their way, and for what else is under way."""
        self.ending = True
        if self._operations:
            await asyncio.wait(self._operations, timeout=_LAST_OPERATIONS_S)

    async def close(self) -> None:
        """Lets operations come to their end, then lets go of everything; machines and frozen processes go on."""
        if self._operations:
            await asyncio.wait(self._operations, timeout=_OPERATIONS_END_S)
        for packing in self.packing.values():
            packing.cancel()
        await self.pool.close()
        for task in list(self._tasks):
            task.cancel()
        await self.network.close(remove=False)
        for live in self.machines.values():
            await live.close_channel()
            if live.process is not None:
                live.process.release()
                await live.process.session.close()
        for process in self.frozen.values():
            process.release()
