"""Acquire: a machine that waits in a pool becomes somebody's.

The database is written once, before the host lets the machine run: that it has left the pool, and its lease. A caller
that goes away in the queue leaves it; one that goes away as it is given a machine gives it back, which removes it: it
has run. A controller that dies in between leaves a lease, which ends by itself.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import structlog

from forkypig.controller.desk import Desk
from forkypig.controller.journal import Flight
from forkypig.controller.live_pool import LivePool
from forkypig.controller.pool_leases import PoolLeases
from forkypig.controller.store import events, pools
from forkypig.core.intents import Intent, IntentKind
from forkypig.core.pools import check_lease
from forkypig.core.reconcile import merge
from forkypig.errors import DeadlineExceeded, ForkyError, HostUnreachable
from forkypig.model import Acquired, Lease, Machine, MachineId
from forkypig.model.pools import DEFAULT_TTL_S

log = structlog.get_logger()

_UNKNOWN = (HostUnreachable, DeadlineExceeded)  # the host may have let it run or not


@dataclass(frozen=True, slots=True)
class _Given:
    """A machine that runs, and its lease."""

    machine: Machine
    lease: Lease


class Acquiring:
    """Acquire, for any pool."""

    def __init__(self, desk: Desk, leases: PoolLeases) -> None:
        self._desk, self._leases = desk, leases

    async def acquire(self, live: LivePool, ttl_s: float, labels: Mapping[str, str], wait_s: float) -> Acquired:
        """A machine that runs. Raises InvalidRequest, ResourceExhausted (none was ready in time), NotFound (the pool
        was removed meanwhile), HostUnreachable."""
        ttl_s = ttl_s or DEFAULT_TTL_S
        check_lease(ttl_s, wait_s, labels)
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        live.demand.note(loop.time())
        until, again = loop.time() + wait_s, False
        while True:
            machine = await live.next_machine(max(0.0, until - loop.time()), first=again)
            waited_ms = (time.perf_counter() - began) * 1000
            if (given := await self._give(live, machine, ttl_s, labels)) is not None:
                return Acquired(given.machine, given.lease, waited_ms)
            again = True

    async def _give(self, live: LivePool, machine: MachineId, ttl_s: float, labels: Mapping[str, str]) -> _Given | None:
        """None: this one was no good, another will do. Carried to its end; what nobody waits for any more goes."""
        handing = self._desk.journal.begin(self._hand_over(live, machine, ttl_s, labels))
        try:
            return await asyncio.shield(handing)
        except asyncio.CancelledError:
            if not handing.cancelled():
                handing.add_done_callback(lambda done: self._give_back(live, done))
            raise

    def _give_back(self, live: LivePool, handing: "asyncio.Future[_Given | None]") -> None:
        if handing.cancelled() or handing.exception() is not None or (given := handing.result()) is None:
            return
        self._desk.journal.begin(self._drop(live, given.machine.id, "its caller has gone away"))

    async def _drop(self, live: LivePool, machine: MachineId, why: str) -> None:
        await self._leases.dispose(live.pool, machine, why)
        live.acquired = max(0, live.acquired - 1)
        live.changed.set()

    async def _hand_over(
        self, live: LivePool, machine: MachineId, ttl_s: float, labels: Mapping[str, str]
    ) -> _Given | None:
        desk = self._desk
        try:
            with desk.journal.flight() as flight:
                if (found := await self._claim(flight, live, machine, ttl_s, labels)) is None:
                    return None
                live.acquired += 1
                self._leases.took(found.lease)
                seen = await self._let_go(live, found.machine)
        finally:
            live.in_hand -= 1
            live.changed.set()
        desk.journal.begin(desk.reconciler.landed(machine))
        return None if seen is None else _Given(merge(found.machine, seen), found.lease)

    async def _claim(
        self, flight: Flight, live: LivePool, machine: MachineId, ttl_s: float, labels: Mapping[str, str]
    ) -> _Given | None:
        """Writes down that it has left the pool, and for how long. None: another controller was faster."""
        pool = live.pool
        async with self._desk.store.write() as tx:
            if (row := await pools.claim(tx, pool.id, machine)) is None:
                return None
            lease = replace(self._leases.new(pool, machine, ttl_s, labels), machine_name=row.name)
            await pools.add_lease(tx, lease)
            await events.add(tx, "machine.acquired", machine, f"{row.name} of {pool.name}, by {lease.holder}")
            flight.take(_acquisition(machine))
            return _Given(row, lease)

    async def _let_go(self, live: LivePool, machine: Machine) -> Machine | None:
        """It runs. None: it can't, and goes."""
        try:
            return await self._desk.host.acquire(machine.id, machine.name)
        except ForkyError as error:
            log.warning("a machine of a pool did not come to run", machine=machine.id, error=str(error))
            self._desk.journal.begin(self._drop(live, machine.id, str(error)))
            if isinstance(error, _UNKNOWN):
                raise
            return None


def _acquisition(machine: MachineId) -> Intent:
    """Marks a machine as one that is being acquired; not a row, its lease is what tells the next controller. Negative,
    and below what marks removals: never a row's number."""
    return Intent(
        id=-(1 << 49) - int(machine[2:], 16), kind=IntentKind.CHANGE, source=machine, arguments={"action": "acquiring"}
    )
