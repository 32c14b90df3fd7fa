"""Forks and snapshots: a machine or a snapshot becomes children, all of them or none.

The children's names and ids, and the snapshot's, are chosen and written down in one transaction before the host is
asked. A fork that its caller leaves is carried through on the host, since a split can't be stopped half-way, and then
its children are removed; the machine it was made of goes on either way.
"""

from dataclasses import dataclass, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_machine, find_source, known_parent
from forkypig.controller.host import Labels
from forkypig.controller.journal import Caller, Flight
from forkypig.controller.leases import check_ttl, wished
from forkypig.controller.principal import principal
from forkypig.controller.quotas import admit
from forkypig.controller.store import events, images, intents, machines, snapshots
from forkypig.controller.tags import check_tag_is_free
from forkypig.core.config import check_may_fork, of_child
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.lifecycle import Action, check_allowed
from forkypig.core.limits import check_count
from forkypig.core.names import child_names
from forkypig.core.quotas import of_machines, of_snapshot
from forkypig.core.reconcile import merge
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError
from forkypig.model import (
    Child,
    ConfigChange,
    ForkOptions,
    ForkResult,
    Machine,
    MachineConfig,
    MachineId,
    MachineState,
    Snapshot,
    SnapshotId,
    SnapshotKind,
    check_message,
    check_name,
    new_machine_id,
    new_snapshot_id,
)


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """What is asked for."""

    source: str  # a machine or a snapshot, as users call it
    count: int
    prefix: str  # of the children's names; "": the source's
    options: ForkOptions
    change: ConfigChange  # of the source's config
    ttl_s: float = 0.0  # a child is removed when it was not used for so long; 0: never


@dataclass(frozen=True, slots=True)
class _Asked:
    """A fork as it was written down."""

    intent: Intent
    source: Machine | Snapshot
    snapshot: SnapshotId  # the one that the children stand on
    children: tuple[Machine, ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """What children take over from where they come from."""

    snapshot: SnapshotId
    parent: MachineId | None
    stem: str  # of their names, when nobody says
    config: MachineConfig
    image_name: str


async def ground_of(tx: AsyncConnection, source: Machine | Snapshot) -> Ground:
    """Raises NotPossibleNow for a machine that can't be forked now, or is not to be."""
    if isinstance(source, Machine):
        check_allowed(source, Action.FORK)
        check_may_fork(source)
        return Ground(new_snapshot_id(), source.id, source.name, source.config, source.image_name)
    image_name = await _image_name(tx, source)
    if source.tenant != principal().tenant:  # of who shares it nothing is told: not its machine, nor how that was set
        return Ground(source.id, None, source.tag or f"fork-{source.id[2:8]}", MachineConfig(), image_name)
    origin = await machines.get(tx, source.machine) if source.machine else None
    stem = source.tag or (origin.name if origin else f"fork-{source.id[2:8]}")
    config = origin.config if origin else MachineConfig()
    return Ground(source.id, source.machine, stem, config, image_name)


async def _image_name(tx: AsyncConnection, source: Snapshot) -> str:
    image = await images.find(tx, source.image, source.tenant)
    return image.name if image else ""


class Forks:
    """Fork and TakeSnapshot."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def fork(self, request: ForkRequest) -> ForkResult:
        """Children of a machine or a snapshot. Raises ForkyError; then nothing of the fork is left, or will be
        as soon as the host can be reached again."""
        caller = Caller()
        return await self._desk.journal.carry(self._fork(request, caller), caller)

    async def _fork(self, request: ForkRequest, caller: Caller) -> ForkResult:
        check_count(request.count)
        check_ttl(request.ttl_s)
        if request.prefix:
            check_name("machine", request.prefix)
        desk = self._desk
        await desk.reconciler.ensure_reachable()
        await desk.admission.refresh()
        with desk.journal.flight() as flight:
            asked = await self._reserve(flight, request)
            try:
                result = await self._on_host(asked, request.options)
                caller.check()
                result = await self._record(asked, result)
            except ForkyError as error:
                await desk.undo(flight, error)
                raise
        await desk.reconciler.landed(*(child.id for child in asked.children), *self._machine_of(asked))
        return result

    def _machine_of(self, asked: _Asked) -> tuple[MachineId, ...]:
        return (asked.source.id,) if isinstance(asked.source, Machine) else ()

    async def _reserve(self, flight: Flight, request: ForkRequest) -> _Asked:
        """Chooses names and ids and writes all down."""
        count = request.count
        async with self._desk.store.write() as tx:
            source, tenant = await find_source(tx, request.source), principal().tenant
            ground = await ground_of(tx, source)
            config = of_child(ground.config, request.change, count, source.shape, source.accelerator)
            await admit(tx, of_machines(source.shape, count, forks=1))
            self._desk.admission.admit(source.shape, count)
            stem = request.prefix or ground.stem
            names = child_names(stem, count, await machines.names(tx, tenant, f"{stem}-"))
            children = tuple(
                Machine(
                    id=new_machine_id(),
                    name=name,
                    state=MachineState.CREATING,
                    image=source.image,
                    image_name=ground.image_name,
                    shape=source.shape,
                    snapshot=source.id if isinstance(source, Snapshot) else None,
                    parent=ground.parent,
                    created_us=now_us(),
                    config=config,
                    tenant=tenant,
                )
                for name in names
            )
            await machines.add(tx, children)
            machine = source.id if isinstance(source, Machine) else None
            intent = await intents.add(
                tx,
                IntentKind.FORK,
                machines=[child.id for child in children],
                # Of a snapshot that is there already nothing is made.
                snapshot=ground.snapshot if machine else None,
                source=machine,
                action=Action.FORK.value,
                **wished(request.ttl_s),
            )
            await events.add(tx, "fork.asked", source.id, f"{count} children: {names[0]} …")
            flight.take(intent)
        return _Asked(intent, source, ground.snapshot, children)

    async def _on_host(self, asked: _Asked, options: ForkOptions) -> ForkResult:
        host = self._desk.host
        if isinstance(asked.source, Snapshot):
            result = await host.fork_snapshot(asked.source.id, asked.children, options)
            host.measured.forked(result)
            return result
        labels = Labels(SnapshotKind.FORK)
        with self._desk.leases.using(asked.source.id):
            return await host.fork_machine(asked.source.id, asked.snapshot, labels, asked.children, options)

    async def _record(self, asked: _Asked, result: ForkResult) -> ForkResult:
        """Everything is there: in one transaction."""
        seen = {child.machine.id: child for child in result.children}
        known = {asked.snapshot}
        children = tuple(
            Child(merge(replace(row, snapshot=asked.snapshot), seen[row.id].machine, known), seen[row.id].ready_ms)
            for row in asked.children
        )
        async with self._desk.finishing(asked.intent, [child.machine for child in children]) as tx:
            snapshot = await self._record_split(tx, asked, result.snapshot)
            for child in children:
                await events.add(tx, f"machine.{child.machine.state.value}", child.machine.id, child.machine.name)
            detail = f"{len(children)} children of {snapshot.id}, pause {result.pause_ms:.1f} ms"
            await events.add(tx, "fork.done", asked.source.id, detail)
        parent = asked.source.id if isinstance(asked.source, Machine) else None
        self._desk.reconciler.collect.set()  # the ground that the parent stood on before may be nobody's now
        return ForkResult(snapshot=snapshot, parent=parent, pause_ms=result.pause_ms, children=children)

    async def _record_split(self, tx: AsyncConnection, asked: _Asked, made: Snapshot) -> Snapshot:
        """The new snapshot, and that the machine's successor stands on it."""
        if isinstance(asked.source, Snapshot):
            return asked.source
        parent = made.parent
        made = replace(await known_parent(tx, made), tenant=asked.source.tenant)
        if made.parent != parent:
            self._desk.reconciler.look_soon()  # a split before this one, not written down yet: its parent
        await snapshots.save(tx, [made])
        await machines.set_snapshot(tx, asked.source.id, made.id)
        await events.add(tx, "snapshot.created", made.id, f"of {asked.source.name}")
        return made

    # -- snapshots -----------------------------------------------------------------------------------------------------

    async def take_snapshot(self, machine: str, tag: str, message: str = "", *, quiesce: bool = False) -> Snapshot:
        """A snapshot that stays until it is removed. Once begun it is carried to its end, whoever waits."""
        return await self._desk.journal.carry(self._take_snapshot(machine, tag, message, quiesce))

    async def _take_snapshot(self, text: str, tag: str, message: str, quiesce: bool) -> Snapshot:
        if tag:
            check_name("snapshot", tag)
        check_message(message)
        desk = self._desk
        await desk.reconciler.ensure_reachable()
        with desk.journal.flight() as flight:
            async with desk.store.write() as tx:
                machine = await find_machine(tx, text)
                check_allowed(machine, Action.SNAPSHOT)
                check_may_fork(machine)
                await check_tag_is_free(tx, tag)
                await admit(tx, of_snapshot())
                intent = await intents.add(
                    tx,
                    IntentKind.SNAPSHOT,
                    snapshot=new_snapshot_id(),
                    source=machine.id,
                    tag=tag,
                    action=Action.SNAPSHOT.value,
                )
                flight.take(intent)
            assert intent.snapshot is not None
            asked = _Asked(intent, machine, intent.snapshot, ())
            try:
                labels = Labels(SnapshotKind.KEPT, tag, message)
                options = ForkOptions(quiesce=quiesce)
                with desk.leases.using(machine.id):
                    result = await desk.host.fork_machine(machine.id, intent.snapshot, labels, (), options)
                async with desk.store.write() as tx:
                    snapshot = await self._record_split(tx, asked, result.snapshot)
                    await intents.end(tx, intent, IntentStatus.DONE)
            except ForkyError as error:
                await desk.undo(flight, error)
                raise
        await desk.reconciler.landed(machine.id)
        desk.reconciler.collect.set()
        return snapshot
