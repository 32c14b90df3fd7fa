"""Acquire: a machine that waits in a pool becomes somebody's.

The database is written once before the answer: that the machine has left the pool, its lease, and that this is under
way, by which a request that comes again finds it. What happened is told behind the answer. A caller that goes away in
the queue leaves it; one that goes away as it is given a machine gives it back, which removes it: it has run.

The host lets it run while that is written down, as soon as the row has left the pool: nobody else can take it then, and
who asked is answered when both are done. Should the writing fail, nobody has the machine; the reconciler sees that it
runs, and what runs in a pool is removed.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from forkypig.controller import retried
from forkypig.controller.desk import Desk
from forkypig.controller.journal import Flight
from forkypig.controller.pools.leases import PoolLeases
from forkypig.controller.pools.live_pool import LivePool
from forkypig.controller.retried import Asked
from forkypig.controller.store import answers, events, intents, pools
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.pools import check_lease
from forkypig.core.reconcile import merge
from forkypig.errors import DeadlineExceeded, ForkyError, HostUnreachable
from forkypig.model import Acquired, Lease, Machine, MachineId
from forkypig.model.pools import DEFAULT_TTL_S

log = structlog.get_logger()

# What perf_counter counts from: arrivals and waits are told by one clock, and so in an exact order.
_EPOCH_S = time.time() - time.perf_counter()
_BEHIND_S = 0.01  # the answer is on its way by then
_UNKNOWN = (HostUnreachable, DeadlineExceeded)  # the host may have let it run or not


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asks for, and how what they get is answered to them, for when they ask again."""

    ttl_s: float
    labels: Mapping[str, str]
    wait_s: float
    answer: Callable[[Acquired], bytes]


@dataclass(frozen=True, slots=True)
class _Turn:
    """How long a caller waited for theirs, and when they came."""

    waited_ms: float
    arrived_us: int


@dataclass(frozen=True, slots=True)
class _Claim:
    """A machine that has left its pool, its lease, what says that this is under way, and what the host says of it."""

    machine: Machine
    lease: Lease
    intent: Intent
    running: asyncio.Future[Machine]


@dataclass(frozen=True, slots=True)
class _Given:
    """A machine that runs, and the note of it that is being written."""

    acquired: Acquired
    claim: _Claim
    asked: Asked | None
    noted: asyncio.Future[None]


class Acquiring:
    """Acquire, for any pool."""

    def __init__(self, desk: Desk, leases: PoolLeases) -> None:
        self._desk, self._leases = desk, leases

    async def acquire(self, live: LivePool, wish: Wish) -> Acquired:
        """A machine that runs. Raises InvalidRequest, ResourceExhausted (none was ready in time), NotFound (the pool
        was removed meanwhile), HostUnreachable."""
        wish = replace(wish, ttl_s=wish.ttl_s or DEFAULT_TTL_S)
        check_lease(wish.ttl_s, wish.wait_s, wish.labels)
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        live.demand.note(loop.time())
        until, again = loop.time() + wish.wait_s, False
        while True:
            machine, given_s = await live.next_machine(max(0.0, until - loop.time()), first=again)
            waited_ms = (given_s - began) * 1000
            given = await self._give(live, machine, wish, _Turn(waited_ms, round((_EPOCH_S + began) * 1e6)))
            if given is not None:
                return given.acquired
            again = True

    async def _give(self, live: LivePool, machine: MachineId, wish: Wish, turn: _Turn) -> _Given | None:
        """None: this one was no good, another will do. Carried to its end; what nobody waits for any more goes."""
        handing = self._desk.journal.begin(self._hand_over(live, machine, wish, turn))
        try:
            return await self._desk.journal.told(handing)
        except asyncio.CancelledError:
            handing.add_done_callback(lambda done: self._give_back(live, done))
            raise

    def _give_back(self, live: LivePool, handing: "asyncio.Future[_Given | None]") -> None:
        if handing.cancelled() or handing.exception() is not None or (given := handing.result()) is None:
            return
        self._desk.journal.begin(self._take_back(live, given))

    async def _take_back(self, live: LivePool, given: _Given) -> None:
        await asyncio.wait({given.noted})
        await self._give_up(live, given.claim, "its caller has gone away", given.asked)

    async def _hand_over(self, live: LivePool, machine: MachineId, wish: Wish, turn: _Turn) -> _Given | None:
        desk = self._desk
        try:
            with contextlib.ExitStack() as stack:
                flight = stack.enter_context(desk.journal.flight())
                flight.take(_acquisition(machine))
                if (claim := await self._claim(flight, live, machine, wish)) is None:
                    return None
                live.in_hand.discard(machine)
                live.acquired += 1
                desk.leases.took(claim.lease)
                try:
                    seen = await claim.running
                except ForkyError as error:
                    log.warning("a machine of a pool did not come to run", machine=machine, error=str(error))
                    await self._give_up(live, claim, str(error), retried.current())
                    if isinstance(error, _UNKNOWN):
                        raise
                    return None
                acquired = Acquired(merge(claim.machine, seen), claim.lease, turn.waited_ms, turn.arrived_us)
                if (asked := retried.current()) is not None:
                    asked.is_kept = True
                # Under way until then: else it could be taken for left over.
                noted = desk.journal.begin(self._note(claim, acquired, wish, asked, stack.pop_all()))
        finally:
            live.in_hand.discard(machine)
            live.changed.set()
        return _Given(acquired, claim, asked, noted)

    async def _claim(self, flight: Flight, live: LivePool, machine: MachineId, wish: Wish) -> _Claim | None:
        """Has it run, and writes down that it has left the pool, and for how long. None: it is not there any more."""
        desk, pool = self._desk, live.pool
        try:
            async with desk.store.write() as tx:
                if (row := await pools.claim(tx, pool.id, machine)) is None:
                    return None
                running = desk.journal.begin(desk.host.acquire(machine))
                lease = replace(self._leases.new(pool, machine, wish.ttl_s, wish.labels), machine_name=row.name)
                writes = [pools.adding_lease(lease)]
                intent = await intents.add(tx, IntentKind.ACQUIRE, machines=[machine], along=writes, pool=pool.id)
                return _Claim(row, lease, flight.take(intent), running)
        except ForkyError:
            desk.reconciler.look_soon()
            raise

    async def _note(
        self, claim: _Claim, acquired: Acquired, wish: Wish, asked: Asked | None, flight: contextlib.ExitStack
    ) -> None:
        """Behind the answer: what happened, and what was answered. Until this is done the lease and the intent say
        it. `flight`: ends it."""
        lease, machine = claim.lease, claim.machine
        with flight:
            await asyncio.sleep(_BEHIND_S)
            try:
                async with self._desk.store.write() as tx:
                    writes = [intents.ending(claim.intent, IntentStatus.DONE)]
                    if asked is not None:
                        writes += await answers.of(tx, asked, wish.answer(acquired))
                    words = f"{machine.name} of {lease.pool_name}, by {lease.holder}"
                    await events.add(tx, "machine.acquired", machine.id, words, along=writes)
            except ForkyError as error:
                log.warning("an acquired machine was not noted", machine=machine.id, error=str(error))
                self._desk.reconciler.look_soon()
        await self._desk.reconciler.landed(machine.id, recorded=acquired.machine)

    async def _give_up(self, live: LivePool, claim: _Claim, why: str, asked: Asked | None) -> None:
        """Nobody gets a machine that was claimed: it goes, and what was asked for is as if it had not been."""
        machine = claim.machine.id
        try:
            async with self._desk.store.write() as tx:
                over = await self._leases.end_at_once(tx, live.pool, machine, why)
                await intents.end(tx, claim.intent, IntentStatus.UNDONE, why)
                if asked is not None:
                    await answers.forget(tx, asked.request)
        except ForkyError as error:
            # Its lease ends by itself; and the intent is open, which is looked into.
            log.warning("a machine of a pool is not removed yet", machine=machine, error=str(error))
            self._desk.reconciler.look_soon()
        else:
            retried.give_back()
            self._desk.journal.begin(self._leases.remove(over))
        live.acquired = max(0, live.acquired - 1)
        live.changed.set()


def _acquisition(machine: MachineId) -> Intent:
    """Marks a machine as one that is being acquired, from before there is a row that says so. Negative, and below what
    marks removals: never a row's number."""
    return Intent(id=-(1 << 49) - int(machine[2:], 16), kind=IntentKind.ACQUIRE, machines=(machine,))
