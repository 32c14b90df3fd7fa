"""Pause, resume, stop, start, restore, hibernate, wake, remove: one machine, carried to the end once begun, whoever
waits for it."""

from collections.abc import Awaitable, Callable

from forkypig.controller.desk import Desk, find_machine, find_snapshot, known_parent
from forkypig.controller.forks import Forks
from forkypig.controller.journal import Flight
from forkypig.controller.quotas import STARTING, admit
from forkypig.controller.store import answers, events, intents, machines, snapshots
from forkypig.controller.store.prepared import run_all
from forkypig.controller.streams import ShowProgress
from forkypig.core.config import changed
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.lifecycle import Action, check_allowed, check_restorable
from forkypig.core.quotas import of_start
from forkypig.core.reconcile import merge
from forkypig.errors import Busy, DeadlineExceeded, ForkyError, HostUnreachable, InternalError, NotFound
from forkypig.model import ConfigChange, Machine, MachineId, MachineState, SnapshotId, new_snapshot_id
from forkypig.wire import convert

# They change nothing that outlives the host's processes, and so need not outlast a power cut. Where the database's
# server alone falls, it may forget that one was begun, but not what came of it.
_OF_PROCESSES = (Action.PAUSE, Action.RESUME)
_UNKNOWN = (HostUnreachable, DeadlineExceeded)  # the host may have done it or not


class Changes:
    """The small operations."""

    def __init__(self, desk: Desk, forks: Forks) -> None:
        self._desk, self._forks = desk, forks

    async def pause(self, machine: str) -> Machine:
        return await self._carry(machine, Action.PAUSE, self._desk.host.pause)

    async def resume(self, machine: str) -> Machine:
        return await self._carry(machine, Action.RESUME, self._desk.host.resume)

    async def stop(self, machine: str, *, force: bool) -> Machine:
        return await self._carry(machine, Action.STOP, lambda found: self._desk.host.stop(found, force=force))

    async def start(self, machine: str) -> Machine:
        return await self._carry(machine, Action.START, self._desk.host.start)

    async def update(self, machine: str, change: ConfigChange) -> Machine:
        """Changes a machine's config; the host does it at once."""
        desk = self._desk

        async def configure(found: MachineId) -> Machine:
            # Read when the operation is under way, so that of two changes none is lost.
            async with desk.store.read() as tx:
                row = await find_machine(tx, found)
            return await desk.host.configure(found, changed(row.config, change))

        return await self._carry(machine, Action.UPDATE, configure)

    async def restore(self, machine: str, snapshot: str, keep_tag: str = "") -> Machine:
        """The machine goes back to a snapshot, in place. `keep_tag`: what it is now is kept first, under this tag."""
        return await self._desk.journal.carry(self._restore(machine, snapshot, keep_tag))

    async def _restore(self, text: str, snapshot: str, keep_tag: str) -> Machine:
        desk = self._desk
        async with desk.store.read() as tx:
            machine, target = await find_machine(tx, text), await find_snapshot(tx, snapshot)
            check_allowed(machine, Action.RESTORE)
            check_restorable(machine, target)
        if keep_tag:
            words = f"what {machine.name} was before it went back to {target.tag or target.id}"
            await self._forks.take_snapshot(machine.id, keep_tag, words)
        return await self._change(
            machine.id, Action.RESTORE, lambda found: desk.host.restore(found, target.id), needs=target.id
        )

    async def hibernate(self, machine: str, show: ShowProgress) -> Machine:
        """Its memory goes to a snapshot, and no QEMU is left. To be carried by the journal."""
        host, snapshot = self._desk.host, new_snapshot_id()

        async def freeze(found: MachineId) -> Machine:
            async for update in host.hibernate(found, snapshot):
                if isinstance(update, Machine):
                    await self._record_snapshot(snapshot)
                    return update
                show(update)
            raise InternalError(f"the hibernation of {found} ended without a machine: hostd's log says more")

        return await self._change(machine, Action.HIBERNATE, freeze, makes=snapshot)

    async def put_to_sleep(self, machine: MachineId) -> None:
        """Hibernates a machine without anybody to tell; for the system, acting in the machine's tenant."""
        await self._desk.journal.carry(self.hibernate(machine, lambda _: None))

    async def _record_snapshot(self, snapshot: SnapshotId) -> None:
        """The one that a hibernation made; none, if the machine was hibernated before."""
        made = (await self._desk.host.snapshots()).get(snapshot)
        if made is not None:
            async with self._desk.store.write() as tx:
                await snapshots.save(tx, [await known_parent(tx, made)])
                await events.add(
                    tx, "snapshot.created", made.id, f"of {made.machine}, which hibernates", tenant=made.tenant
                )

    async def wake(self, machine: str) -> Machine:
        return await self._carry(machine, Action.WAKE, self._desk.host.wake)

    async def _carry(self, text: str, action: Action, do: Callable[[MachineId], Awaitable[Machine]]) -> Machine:
        return await self._desk.journal.carry(self._change(text, action, do))

    async def _change(
        self,
        text: str,
        action: Action,
        do: Callable[[MachineId], Awaitable[Machine]],
        *,
        needs: SnapshotId | None = None,
        makes: SnapshotId | None = None,
    ) -> Machine:
        """`needs`: a snapshot that must stay meanwhile; `makes`: one that comes with it."""
        desk, snapshot, lasts = self._desk, needs or makes, action not in _OF_PROCESSES
        if not desk.reconciler.connected:  # what is wrong anyway is told also when the host is away
            async with desk.store.glance() as tx:
                check_allowed(await find_machine(tx, text), action)
            await desk.reconciler.ensure_reachable()
        if action in STARTING:
            await desk.admission.refresh()
        with desk.journal.flight() as flight:
            async with desk.store.write(lasts=lasts) as tx:
                machine = await find_machine(tx, text)
                check_allowed(machine, action)
                if action in STARTING and machine.qemu_pid is None:
                    desk.admission.admit(machine.shape, 1, boots=action is Action.START)
                    await admit(tx, of_start(machine.shape))
                if needs is not None and await snapshots.get(tx, needs) is None:
                    raise NotFound("snapshot", needs, "it was removed just now; see forky snapshots")
                intent = await intents.add(
                    tx, IntentKind.CHANGE, source=machine.id, snapshot=snapshot, action=action.value
                )
                flight.take(intent)
            try:
                with desk.leases.using(machine.id):
                    seen = await do(machine.id)
            except ForkyError as error:
                await self._failed(intent, machine, error)
                raise
            try:
                machine = await self._done(intent, machine, seen, lasts=lasts, streams=makes is not None)
            except ForkyError:
                desk.reconciler.look_soon()
                raise
        await desk.reconciler.landed(machine.id, recorded=machine)
        if snapshot is not None:
            desk.reconciler.collect.set()  # what it stood on before may be nobody's now
        return machine

    async def _done(self, intent: Intent, machine: Machine, seen: Machine, *, lasts: bool, streams: bool) -> Machine:
        """Writes down what became of it. `streams`: what is answered is a stream, of which the edge keeps the end."""
        async with self._desk.store.write(lasts=lasts or self._desk.store.is_shared) as tx:
            # A fork may have moved it to another snapshot meanwhile.
            row = await machines.get(tx, machine.id) or machine
            made = merge(row, seen, {intent.snapshot})
            writes = [machines.saving(made), intents.ending(intent, IntentStatus.DONE)]
            if not streams:
                writes += await answers.along(tx, None, lambda: convert.machine_to_wire(made).SerializeToString())
            if row.state is not made.state:
                await events.add(tx, f"machine.{made.state.value}", made.id, made.name, along=writes)
            else:
                await run_all(tx, writes)
        return made

    async def _failed(self, intent: Intent, machine: Machine, error: ForkyError) -> None:
        async with self._desk.store.write() as tx:
            ended = intents.ending(intent, IntentStatus.UNDONE, str(error))
            await events.add(tx, f"{intent.kind.value}.failed", machine.id, str(error), along=[ended])
        if not isinstance(error, Busy):
            self._desk.reconciler.look_soon(0.0)  # what became of the machine is for the host to say

    # -- removal -------------------------------------------------------------------------------------------------------

    async def remove(self, machine: str) -> None:
        """Removes a machine in any state but CREATING. What was forked from it stays."""
        await self._desk.journal.carry(self._remove(machine))

    async def _remove(self, text: str) -> None:
        desk = self._desk
        if not desk.reconciler.connected:  # as above
            async with desk.store.glance() as tx:
                await find_machine(tx, text)
            await desk.reconciler.ensure_reachable()
        with desk.journal.flight() as flight:
            machine, intent = await self._mark(flight, text)
            try:
                await desk.host.remove_machine(machine.id)
            except _UNKNOWN as error:
                desk.reconciler.look_soon()  # the intent stays open
                raise type(error)(
                    f"machine «{machine.name}» is not removed yet, it goes as soon as the host can do it: {error}"
                ) from error
            except ForkyError as error:
                async with desk.store.write() as tx:
                    await machines.set_state(tx, machine.id, machine.state)
                    ended = intents.ending(intent, IntentStatus.UNDONE, str(error))
                    await events.add(tx, "remove-machine.failed", machine.id, str(error), along=[ended])
                desk.reconciler.look_soon(0.0)
                raise
            async with desk.store.write() as tx:
                await machines.delete_all(tx, [machine.id])
                # The answer is empty.
                writes = [intents.ending(intent, IntentStatus.DONE), *await answers.along(tx, intent.kind, bytes)]
                await events.add(tx, "machine.removed", machine.id, machine.name, along=writes)
        desk.reconciler.forget(machine.id)
        desk.reconciler.collect.set()

    async def _mark(self, flight: Flight, text: str) -> tuple[Machine, Intent]:
        async with self._desk.store.write() as tx:
            machine = await find_machine(tx, text)
            doing = await self._desk.operation_on(tx, machine)
            if machine.state is MachineState.CREATING or doing == Action.REMOVE.value:
                raise Busy(f"machine «{machine.name}»", doing or machine.state.value)
            check_allowed(machine, Action.REMOVE)
            await machines.set_state(tx, machine.id, MachineState.REMOVING)
            intent = await intents.add(tx, IntentKind.REMOVE_MACHINE, machines=[machine.id])
            return machine, flight.take(intent)
