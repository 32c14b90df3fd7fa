"""`forky run` from a pool: where a machine waits that is what is asked for, it is taken instead of one being made.

It becomes an ordinary machine, with the name and the config that were asked for, and with a lease only if that was.
"""

from collections.abc import Callable
from dataclasses import replace

from forkypig.controller.desk import Desk
from forkypig.controller.journal import Flight
from forkypig.controller.leases import wished
from forkypig.controller.pools.live_pool import LivePool
from forkypig.controller.store import events, intents, machines, pools
from forkypig.core.intents import Intent, IntentKind
from forkypig.core.reconcile import merge
from forkypig.errors import AlreadyExists, ForkyError
from forkypig.model import Machine, MachineConfig, MachineId


class PoolRuns:
    """Takes machines out of pools."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def take(
        self, live: LivePool, name: str, config: MachineConfig, ttl_s: float, check: Callable[[], None]
    ) -> Machine | None:
        """A machine that runs, called `name` ("": as it is); None: none is ready. `check` raises when the caller has
        left. Raises AlreadyExists, and what the host does not let a machine have; then nothing is left of it."""
        machine = live.take()
        if machine is None:
            return None
        live.changed.set()
        desk = self._desk
        with desk.journal.flight() as flight:
            found = await self._claim(flight, live, machine, name, ttl_s)
            live.in_hand.discard(machine)
            if found is None:
                return None
            row, intent = found
            try:
                seen = await desk.host.acquire(machine, row.name)
                if config != seen.config:
                    seen = await desk.host.configure(machine, config)
                check()
                made = merge(row, seen)
                async with desk.finishing(intent, [made]):
                    pass
            except ForkyError as error:
                await desk.undo(flight, error)
                raise
        await desk.reconciler.landed(machine)
        return made

    async def _claim(
        self, flight: Flight, live: LivePool, machine: MachineId, name: str, ttl_s: float
    ) -> tuple[Machine, Intent] | None:
        """Takes it out of the pool, by its new name. None: another controller was faster."""
        try:
            async with self._desk.store.write() as tx:
                if name and await machines.by_name(tx, live.pool.tenant, name) is not None:
                    raise AlreadyExists("machine", name)
                if (row := await pools.claim(tx, live.pool.id, machine)) is None:
                    return None
                if name:
                    await pools.rename(tx, machine, name)
                    row = replace(row, name=name)
                intent = await intents.add(tx, IntentKind.RUN, machines=[machine], pool=live.pool.id, **wished(ttl_s))
                await events.add(tx, "machine.created", machine, f"{row.name}, from pool {live.pool.name}")
                flight.take(intent)
                return row, intent
        except ForkyError:
            live.put(machine)  # nothing was done to it
            raise
