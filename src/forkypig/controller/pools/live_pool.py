"""A pool as the controller holds it: its line of machines and callers, and what is known of its demand.

All of it is gone when the controller ends: the database says which machines wait in which pool, and callers ask again.
"""

import asyncio
import time

from forkypig.core.pools import LEAST_REFILL_S, Demand, Line, Stock, wanted
from forkypig.errors import NotFound, ResourceExhausted
from forkypig.model import MachineId, Pool

# Of the time that a refill takes, how much the newest counts.
_NEWEST = 0.3


class LivePool:
    """One pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.line: Line[MachineId, asyncio.Future[tuple[MachineId, float]]] = Line()
        self.demand = Demand()
        self.filling = 0
        self.elsewhere = 0  # machines that another controller makes, or left half-made
        self.acquired = 0
        self.in_hand: set[MachineId] = set()  # taken out of the line; the database does not know yet
        self.owed = 0  # machines that were given back to be recycled
        self.failure = ""  # why the last refill failed
        self.changed = asyncio.Event()  # its filler has to look
        self.fresh: set[MachineId] = set()  # ready since the database was last asked
        self.still = asyncio.Event()  # no refill is under way
        self.still.set()
        self.closed = False
        self._refill_s = LEAST_REFILL_S

    @property
    def stock(self) -> Stock:
        return Stock(
            ready=len(self.line.ready),
            filling=self.filling + self.elsewhere,
            acquired=self.acquired + len(self.in_hand),
            waiting=len(self.line.waiting),
            owed=self.owed,
        )

    @property
    def wanted(self) -> int:
        """How many machines are to stand ready."""
        busiest = self.demand.busiest(self._refill_s, asyncio.get_running_loop().time())
        return wanted(self.pool.target, self.pool.max, busiest)

    def refilled(self, took_s: float) -> None:
        """A refill took so long."""
        self.failure = ""
        self._refill_s = max(LEAST_REFILL_S, (1 - _NEWEST) * self._refill_s + _NEWEST * took_s)

    def put(self, machine: MachineId) -> None:
        """A machine is ready, or given back: it is for whoever has waited longest, or stands in line."""
        self.in_hand.discard(machine)
        self.fresh.add(machine)
        while (waiter := self.line.put(machine)) is not None:
            if not waiter.done():  # else they have just left
                waiter.set_result((machine, time.perf_counter()))
                self.in_hand.add(machine)
                return

    def take(self) -> MachineId | None:
        """A machine for somebody who does not wait; it is `in_hand` from then on."""
        if (machine := self.line.take()) is not None:
            self.in_hand.add(machine)
        return machine

    async def next_machine(self, wait_s: float, *, first: bool = False) -> tuple[MachineId, float]:
        """The next machine that is ready, in turn, and when it was given (perf_counter, s); it is `in_hand` from then
        on. `first`: a caller who had their turn, and got nothing of use.

        Raises ResourceExhausted, with what to do, when none is ready in time; NotFound when the pool is removed."""
        if self.closed:
            raise self._gone()
        if (machine := self.take()) is not None:
            return machine, time.perf_counter()
        turn: asyncio.Future[tuple[MachineId, float]] = asyncio.get_running_loop().create_future()
        self.line.join(turn, first=first)
        self.changed.set()
        try:
            async with asyncio.timeout(wait_s):
                return await turn
        except BaseException as error:
            self.line.leave(turn)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.put(turn.result()[0])  # it came as they went
            if isinstance(error, TimeoutError):
                raise ResourceExhausted(self._why(wait_s)) from error
            raise

    def close(self) -> None:
        """The pool is removed."""
        self.closed = True
        for turn in list(self.line.waiting):
            if not turn.done():
                turn.set_exception(self._gone())
        self.line.waiting.clear()
        self.line.ready.clear()
        self.changed.set()

    def _gone(self) -> NotFound:
        return NotFound("pool", self.pool.name, "it was removed; see forky pool ls")

    def _why(self, wait_s: float) -> str:
        name, stock = self.pool.name, self.stock
        said = f"no machine of pool «{name}» was ready" + (f" within {wait_s:.3g} s" if wait_s else "")
        if self.failure:
            return f"{said}, and it can't be refilled: {self.failure}"
        if stock.ready + stock.filling + stock.acquired >= self.pool.max and stock.acquired:
            return (
                f"{said}: {stock.acquired} of the {self.pool.max} that it may have are acquired; release some "
                f"(forky release MACHINE), or allow more with forky pool scale {name} --max N"
            )
        return (
            f"{said}, it is being refilled: wait longer (--wait), or keep more ready with "
            f"forky pool scale {name} --target N"
        )
