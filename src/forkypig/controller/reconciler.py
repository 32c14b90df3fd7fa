"""Keeps the records true: after a start, whenever hostd comes back, after failures, and as machines change.

The decisions are in core/reconcile.py. This asks hostd what is there, carries the plan out, and listens to hostd's
stream of changes. An event that contradicts a record is not believed by itself, since it may be older than the
record: it is a reason to ask.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.host import Host
from forkypig.controller.journal import Flight, Journal
from forkypig.controller.leases import Leases, begin
from forkypig.controller.peers import Peers
from forkypig.controller.store import Store, events, images, intents, machines, snapshots
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.reconcile import Plan, Records, merge, plan
from forkypig.errors import ForkyError, HostUnreachable
from forkypig.model import ImageId, Machine, MachineId, MachineState, SnapshotId
from forkypig.model.access import DEFAULT_TENANT

log = structlog.get_logger()

_RETRY_S = 0.3  # between attempts to reach hostd
_AGAIN_S = 2.0  # until things are looked at again that the host was still at
_GATHER_S = 0.05  # machines that change together are asked about once
_REMOVALS = 8  # at the same time


class Reconciler:
    """One host's records."""

    def __init__(self, store: Store, host: Host, journal: Journal, peers: Peers, leases: Leases) -> None:
        self._store, self._host, self._journal, self._peers, self._leases = store, host, journal, peers, leases
        self._turn = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._again: asyncio.TimerHandle | None = None
        self._latest: dict[MachineId, Machine] = {}  # of machines that operations are about
        self.connected = False
        self.error = ""  # why hostd can't be reached
        self.collect = asyncio.Event()  # set when snapshots may have become unneeded

    # -- running -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Watches hostd for ever."""
        self._peers.on_work = self._peers.on_lead = lambda: self.look_soon(0.0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_when_wanted())
            while True:
                try:
                    await self._follow()
                except ForkyError as error:
                    if self.connected or str(error) != self.error:
                        log.warning("hostd lost", error=str(error))
                    self.error = str(error)
                except Exception as error:  # the edge of a task that everything else relies on
                    log.exception("the reconciler failed and begins again")
                    self.error = f"an unexpected error ({type(error).__name__}): the controller's log says more"
                self.connected = False
                await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        """One connection's life. The first answer of the stream shows that hostd serves; then everything is compared,
        and changes that come meanwhile wait in the stream."""
        await self._host.status(timeout_s=10.0)
        async with contextlib.aclosing(self._host.watch()) as stream:
            first = asyncio.ensure_future(anext(stream))
            try:
                # The stream is opened before the comparison: what changes after the one is told by the other.
                await asyncio.wait({first}, timeout=_GATHER_S)
                if led := self._peers.leads:
                    await self.reconcile()
                    await self._mirror_images()
                self.connected, self.error = True, ""
                if not led:
                    self.look_soon(0.0)  # it may lead by now; if not, it asks the one that does
                log.info("hostd followed")
                await self._changed(await first)
            finally:
                first.cancel()
                await asyncio.wait({first})  # not awaited itself: our own end would look like its
                if not first.cancelled():
                    first.exception()  # it was told, or another is
            async for machine in stream:
                await self._changed(machine)
        raise HostUnreachable("hostd ended its stream of changes: run `forky up`")

    async def ensure_reachable(self) -> None:
        """Raises HostUnreachable before anything is written down or begun, where hostd is not there."""
        if not self.connected:
            await self._host.status()

    async def _mirror_images(self) -> None:
        there = await self._host.images()
        async with self._store.write() as tx:
            await images.replace_all(tx, there)

    # -- changes as they come ------------------------------------------------------------------------------------------

    async def _changed(self, seen: Machine) -> None:
        if seen.state is MachineState.CREATING or not self._peers.leads:
            return  # it is another controller that keeps the records true
        if self._journal.concerns(seen.id):
            self._latest[seen.id] = seen
            return
        try:
            await self._apply(seen)
        except ForkyError as error:
            log.warning("a change was not recorded", machine=seen.id, error=str(error))
            self.look_soon()

    async def _apply(self, seen: Machine) -> None:
        """Details are taken as they are, a state only if it is what the record says."""
        async with self._store.glance() as tx:
            row = await machines.get(tx, seen.id)
            others = await self._peers.others_at(tx, seen.id)
        if others:
            self.look_soon()  # another controller is at it, and records what becomes of it
            return
        if row is None or row.state is not seen.state:
            if row is not None or seen.state is not MachineState.REMOVING:
                self.look_soon(_GATHER_S)
            return
        if merge(row, seen) == row:
            return
        async with self._store.write() as tx:
            # Once more, now that nobody else writes.
            if (row := await machines.get(tx, seen.id)) is not None and row.state is seen.state:
                await machines.save_known(tx, [merge(row, seen)])

    async def landed(self, *about: MachineId, recorded: Machine | None = None) -> None:
        """An operation on these machines is over: what was told of them meanwhile is held against the records, or
        against what was `recorded` a moment ago."""
        for machine in about:
            seen = self._latest.pop(machine, None)
            if seen is None or (recorded is not None and merge(recorded, seen, {recorded.snapshot}) == recorded):
                continue
            await self._changed(seen)

    def forget(self, machine: MachineId) -> None:
        """A machine is gone."""
        self._latest.pop(machine, None)

    # -- comparing everything ------------------------------------------------------------------------------------------

    def look_soon(self, delay_s: float = _AGAIN_S) -> None:
        """Has everything compared in a while; the earliest wish counts."""
        loop = asyncio.get_running_loop()
        if self._again is not None:
            if self._again.when() <= loop.time() + delay_s:
                return
            self._again.cancel()
        self._again = loop.call_later(delay_s, self._want)

    def _want(self) -> None:
        self._again = None
        self._wanted.set()

    async def _look_when_wanted(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if not self._peers.leads:
                self._peers.wish()
                continue
            if not self.connected:
                continue  # everything is compared when hostd is back
            try:
                await self.reconcile()
            except ForkyError as error:
                log.warning("not reconciled", error=str(error))
                self.look_soon()
            except Exception:  # the edge of a task that everything else relies on
                log.exception("reconciling failed")
                self.look_soon()

    async def reconcile(self) -> None:
        """Compares, and makes the records and the host agree. Raises ForkyError where either can't be reached.

        For the leader only."""
        await self._peers.fence_off()
        with self._journal.flight() as flight:
            async with self._turn:
                made = await self._decide(flight)
            self._leases.to_look.set()  # of what was finished
            await self._remove(made)
        if made.waiting:
            self.look_soon()
        self.collect.set()

    async def settle(self, failed: Sequence[Intent]) -> None:
        """Has these undone, and returns when they are: here, or by the controller that leads."""
        if self._peers.leads:
            await self.reconcile()
        else:
            await self._peers.settled(failed)

    async def _decide(self, flight: Flight) -> Plan:
        """What to do, and of that our own part. The records are read when the host has answered: what operations were
        about that began meanwhile, here or at another controller, is left alone."""
        with self._journal.touched() as touched:
            async with self._store.read() as tx:
                newest = await intents.newest(tx)
                _, others = await self._peers.sorted_intents(tx)
            seen = await self._host.seen()
            async with self._store.write() as tx:
                left, still = await self._peers.sorted_intents(tx)
                meanwhile = await intents.names_since(tx, newest)
                records = Records(
                    machines={m.id: m for m in await machines.every(tx)},
                    snapshots={s.id: s for s in await snapshots.every(tx)},
                    intents=tuple(
                        replace(i, status=IntentStatus.UNDOING) if i.id in self._journal.failed else i for i in left
                    ),
                    undone=await intents.undone_ids(tx),
                    untouchable=frozenset(touched | meanwhile).union(*(i.names for i in (*others, *still))),
                    template_keys=frozenset(await snapshots.template_keys(tx)),
                )
                made = plan(records, seen)
                await self._record(tx, made, records)
        for machine_id in made.remove_machines:
            flight.take(_removal(machine_id))
        return made

    async def _record(self, tx: AsyncConnection, made: Plan, records: Records) -> None:
        """The plan's part in our own database. Intents whose removals are still to be done stay open for those."""
        removals = {*made.remove_machines, *made.remove_snapshots}
        names = {image.id: image.name for image in await images.every(tx)}
        await snapshots.save(tx, made.record_snapshots)
        for snapshot in made.record_snapshots:
            if snapshot.id in made.templates:
                await snapshots.set_template(tx, snapshot)
        for machine in made.record_machines:
            await self._record_machine(tx, machine, records.machines.get(machine.id), names)
        await machines.delete_all(tx, made.forget_machines)
        for gone in made.forget_machines:
            tenant = records.machines[gone].tenant
            await events.add(tx, "machine.removed", gone, "it was never finished", tenant=tenant)
        for lost in made.forget_snapshots:
            await snapshots.delete_one(tx, lost)
            words, tenant = "the host does not have it any more", records.snapshots[lost].tenant
            await events.add(tx, "snapshot.lost", lost, words, tenant=tenant)
        for intent in made.finished:
            await begin(tx, intent, [records.machines[m] for m in intent.machines if m in records.machines])
        for intent, status in self._ended(made):
            if not removals & intent.names:
                await self._end(tx, intent, status)

    async def _record_machine(
        self, tx: AsyncConnection, machine: Machine, before: Machine | None, names: dict[ImageId, str]
    ) -> None:
        if not machine.image_name:
            machine = replace(machine, image_name=names.get(machine.image, ""))
        await machines.save(tx, [machine])
        if before is None:
            words = f"{machine.name}, found on the host"
            await events.add(tx, "machine.adopted", machine.id, words, tenant=machine.tenant)
        elif before.state is not machine.state:
            kind = f"machine.{machine.state.value}"
            await events.add(tx, kind, machine.id, machine.failure, tenant=machine.tenant)

    def _ended(self, made: Plan) -> list[tuple[Intent, IntentStatus]]:
        return [
            *((intent, IntentStatus.DONE) for intent in made.finished),
            *((intent, IntentStatus.UNDONE) for intent in made.undone),
        ]

    async def _end(self, tx: AsyncConnection, intent: Intent, status: IntentStatus) -> None:
        await intents.end(tx, intent, status)
        words = f"{intent.kind.value}, reconciled"
        await events.add(tx, f"operation.{status.value}", str(intent.id), words, tenant=intent.tenant)
        self._journal.failed.discard(intent.id)
        log.info("reconciled", intent=intent.id, kind=intent.kind.value, status=status.value)

    async def _remove(self, made: Plan) -> None:
        """The host's part. What fails stays open and is tried again later."""
        gone: set[str] = set()
        slots = asyncio.Semaphore(_REMOVALS)

        async def remove_machine(machine: MachineId) -> None:
            async with slots:
                await self._host.remove_machine(machine)
            async with self._store.write() as tx:
                row = await machines.get(tx, machine)
                tenant = row.tenant if row else DEFAULT_TENANT
                await machines.delete_all(tx, [machine])
                await events.add(tx, "machine.removed", machine, "undone or left over", tenant=tenant)
            gone.add(machine)

        async def remove_snapshot(snapshot: SnapshotId) -> None:
            async with slots:
                await self._host.remove_snapshot(snapshot)
            async with self._store.write() as tx:
                tenant = next((s.tenant for s in await snapshots.every(tx) if s.id == snapshot), DEFAULT_TENANT)
                await snapshots.delete_one(tx, snapshot)
                await events.add(tx, "snapshot.removed", snapshot, tenant=tenant)
            gone.add(snapshot)

        work = [remove_machine(m) for m in made.remove_machines] + [remove_snapshot(s) for s in made.remove_snapshots]
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, ForkyError):
                log.warning("not removed yet", error=str(outcome))
                self.look_soon()
            elif isinstance(outcome, BaseException):
                raise outcome
        left = {*made.remove_machines, *made.remove_snapshots} - gone
        async with self._store.write() as tx:
            for intent, status in self._ended(made):
                if intent.names & gone and not intent.names & left:
                    await self._end(tx, intent, status)


def _removal(machine: MachineId) -> Intent:
    """Marks a machine that the reconciler removes as being removed; not a row. Negative: never a row's number."""
    return Intent(id=-int(machine[2:], 16) - 1, kind=IntentKind.REMOVE_MACHINE, machines=(machine,))
