"""Pause, resume, stop, start, remove: one machine, carried to the end once begun, whoever waits for it."""

from collections.abc import Awaitable, Callable

from forkypig.controller.desk import Desk, find_machine
from forkypig.controller.journal import Flight
from forkypig.controller.store import events, intents, machines
from forkypig.core.config import changed
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.lifecycle import Action, check_allowed
from forkypig.core.reconcile import merge
from forkypig.errors import Busy, DeadlineExceeded, ForkyError, HostUnreachable
from forkypig.model import ConfigChange, Machine, MachineId, MachineState

_UNKNOWN = (HostUnreachable, DeadlineExceeded)  # the host may have done it or not


class Changes:
    """The small operations."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

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

    async def _carry(self, text: str, action: Action, do: Callable[[MachineId], Awaitable[Machine]]) -> Machine:
        return await self._desk.journal.carry(self._change(text, action, do))

    async def _change(self, text: str, action: Action, do: Callable[[MachineId], Awaitable[Machine]]) -> Machine:
        desk = self._desk
        async with desk.store.read() as tx:
            check_allowed(await find_machine(tx, text), action)
        await desk.reconciler.ensure_reachable()
        with desk.journal.flight() as flight:
            async with desk.store.write() as tx:
                machine = await find_machine(tx, text)
                check_allowed(machine, action)
                intent = await intents.add(tx, IntentKind.CHANGE, source=machine.id, action=action.value)
                flight.take(intent)
            try:
                seen = await do(machine.id)
            except ForkyError as error:
                await self._failed(intent, machine, error)
                raise
            async with desk.store.write() as tx:
                # A fork may have moved it to another snapshot meanwhile.
                row = await machines.get(tx, machine.id) or machine
                machine = merge(row, seen)
                await machines.save_known(tx, [machine])
                await intents.end(tx, intent, IntentStatus.DONE)
                if row.state is not machine.state:
                    await events.add(tx, f"machine.{machine.state.value}", machine.id, machine.name)
        await desk.reconciler.landed(machine.id)
        return machine

    async def _failed(self, intent: Intent, machine: Machine, error: ForkyError) -> None:
        async with self._desk.store.write() as tx:
            await intents.end(tx, intent, IntentStatus.UNDONE, str(error))
            await events.add(tx, f"{intent.kind.value}.failed", machine.id, str(error))
        if not isinstance(error, Busy):
            self._desk.reconciler.look_soon(0.0)  # what became of the machine is for the host to say

    # -- removal -------------------------------------------------------------------------------------------------------

    async def remove(self, machine: str) -> None:
        """Removes a machine in any state but CREATING. What was forked from it stays."""
        await self._desk.journal.carry(self._remove(machine))

    async def _remove(self, text: str) -> None:
        desk = self._desk
        async with desk.store.read() as tx:
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
                    await intents.end(tx, intent, IntentStatus.UNDONE, str(error))
                    await events.add(tx, "remove-machine.failed", machine.id, str(error))
                desk.reconciler.look_soon(0.0)
                raise
            async with desk.store.write() as tx:
                await machines.delete_all(tx, [machine.id])
                await intents.end(tx, intent, IntentStatus.DONE)
                await events.add(tx, "machine.removed", machine.id, machine.name)
        desk.reconciler.forget(machine.id)
        desk.reconciler.collect.set()

    async def _mark(self, flight: Flight, text: str) -> tuple[Machine, Intent]:
        async with self._desk.store.write() as tx:
            machine = await find_machine(tx, text)
            doing = self._desk.journal.operation_on(machine)
            if machine.state is MachineState.CREATING or doing == Action.REMOVE.value:
                raise Busy(f"machine «{machine.name}»", doing or machine.state.value)
            check_allowed(machine, Action.REMOVE)
            await machines.set_state(tx, machine.id, MachineState.REMOVING)
            intent = await intents.add(tx, IntentKind.REMOVE_MACHINE, machines=[machine.id])
            return machine, flight.take(intent)
