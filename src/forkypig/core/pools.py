"""How many machines a pool is to have, and who gets the next one. Pure.

A pool keeps as many machines ready as were asked for at the busiest, of late, in the time that a refill takes: then the
next such rush finds them there. Never fewer than its target, never more altogether than its maximum.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from forkypig.errors import InvalidRequest

MOST_MACHINES = 1000
MOST_LABELS = 32
LEAST_TTL_S, MOST_TTL_S = 1.0, 30 * 86_400.0
MOST_WAIT_S = 3600.0

# How long a rush is remembered.
REMEMBERED_S = 300.0
_MOST_REMEMBERED = 2 * MOST_MACHINES
# More than are wanted go when nothing was asked for or given back for this long: a pool must not make with one hand
# what it removes with the other.
QUIET_S = 60.0
# Children of one fork come together, so few at a time: the first of many is not to wait for the last.
MOST_AT_ONCE = 4
# Refills of a pool that is nearly full give way to those who are just being given machines: they begin when nothing was
# asked for or given back for this long, and are put off by so much at most. The emptier, the sooner: a pool that is
# asked all the time is to stay ahead.
LULL_S, MOST_LULL_S = 0.25, 2.0
# With nothing left that is ready the next caller would wait for it: only the one who took the last goes first.
LEAST_LULL_S = 0.05
# A refill that takes less is not worth to be remembered as faster: the rush of a moment is to be met.
LEAST_REFILL_S = 1.0

Machine = TypeVar("Machine")
Waiter = TypeVar("Waiter")


def check_sizes(target: int, most: int) -> None:
    """Raises InvalidRequest for sizes that no pool can have."""
    if not 0 <= target <= most or not 1 <= most <= MOST_MACHINES:
        raise InvalidRequest(
            f"a pool can't have a target of {target} and a maximum of {most}: "
            f"the target is at least 0 and at most the maximum, which is 1 to {MOST_MACHINES}"
        )


def check_lease(ttl_s: float, wait_s: float, labels: Mapping[str, str]) -> None:
    """Raises InvalidRequest for what no lease can be. Comparisons that a NaN fails, too."""
    if not LEAST_TTL_S <= ttl_s <= MOST_TTL_S:
        raise InvalidRequest(f"a lease of {ttl_s:.12g} s is not possible: ask for 1 s to 30 days")
    if not 0 <= wait_s <= MOST_WAIT_S:
        raise InvalidRequest(f"a wait of {wait_s:.12g} s is not possible: ask for 0 s to one hour")
    if len(labels) > MOST_LABELS or any(not 0 < len(k) <= 63 or len(v) > 255 for k, v in labels.items()):
        raise InvalidRequest(
            f"a lease has at most {MOST_LABELS} labels, with keys of 1 to 63 and values of at most 255 characters: "
            f"use fewer or shorter ones"
        )


class Demand:
    """What was asked of one pool of late. Times are seconds of one clock that never goes back."""

    def __init__(self) -> None:
        self._asked: deque[float] = deque(maxlen=_MOST_REMEMBERED)
        self._last_s = float("-inf")

    def note(self, now_s: float) -> None:
        """A machine is asked for."""
        self._asked.append(now_s)
        self._last_s = now_s

    def stir(self, now_s: float) -> None:
        """Something else happened that shows that the pool is in use."""
        self._last_s = now_s

    def is_quiet(self, now_s: float) -> bool:
        return now_s - self._last_s >= QUIET_S

    def busiest(self, span_s: float, now_s: float) -> int:
        """The most machines that were asked for within any `span_s`, of those that are remembered."""
        while self._asked and now_s - self._asked[0] > REMEMBERED_S:
            self._asked.popleft()
        most = 0
        window: deque[float] = deque()
        for asked_s in self._asked:
            window.append(asked_s)
            while asked_s - window[0] > span_s:
                window.popleft()
            most = max(most, len(window))
        return most


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What a pool has."""

    ready: int
    filling: int = 0  # on their way
    acquired: int = 0
    waiting: int = 0  # callers
    owed: int = 0  # machines that were given back to be recycled


def wanted(target: int, most: int, busiest: int) -> int:
    """How many machines are to stand ready."""
    return min(max(target, busiest), most)


def missing(stock: Stock, ready: int, most: int) -> int:
    """How many machines are to be made now, where `ready` are wanted and `most` are allowed altogether."""
    short = max(ready, min(stock.ready + stock.owed, most)) + stock.waiting - stock.ready - stock.filling
    room = most - stock.ready - stock.filling - stock.acquired
    return max(0, min(short, room))


def put_off_s(stock: Stock, ready: int, quiet_s: float, due_s: float) -> float:
    """For how long, in seconds, a refill that has been due for `due_s` is still to wait, where `ready` are wanted and
    nothing was asked for or given back for `quiet_s`. Not at all where callers wait."""
    if stock.waiting or stock.owed:
        return 0.0
    full = min(1.0, stock.ready / max(1, ready))
    lull_s, most_s = (max(LEAST_LULL_S, full * of_a_full_one) for of_a_full_one in (LULL_S, MOST_LULL_S))
    return max(0.0, min(lull_s - quiet_s, most_s - due_s))


def surplus(stock: Stock, ready: int, most: int, *, quiet: bool) -> int:
    """How many of those that are ready are to go: beyond the maximum at once, more than are wanted when it is quiet."""
    beyond = max(0, stock.ready + stock.filling + stock.acquired - most)
    if quiet and not stock.waiting and not stock.filling and not stock.owed:
        beyond = max(beyond, stock.ready - ready)
    return min(beyond, stock.ready)


@dataclass(slots=True)
class Line(Generic[Machine, Waiter]):
    """Machines that are ready, and callers who wait for one: never both. First come, first served, on both sides."""

    ready: deque[Machine] = field(default_factory=deque)
    waiting: deque[Waiter] = field(default_factory=deque)

    def take(self) -> Machine | None:
        """A machine for somebody who comes now; None: they have to wait."""
        return self.ready.popleft() if self.ready and not self.waiting else None

    def put(self, machine: Machine) -> Waiter | None:
        """A machine is ready. Returns the one who gets it; None: it stands ready."""
        if self.waiting:
            return self.waiting.popleft()
        self.ready.append(machine)
        return None

    def join(self, waiter: Waiter, *, first: bool = False) -> None:
        """Somebody waits. `first`: they had their turn already, and what they got was no good."""
        if first:
            self.waiting.appendleft(waiter)
        else:
            self.waiting.append(waiter)

    def leave(self, waiter: Waiter) -> None:
        """They don't wait any more; fine for one who never did."""
        if waiter in self.waiting:
            self.waiting.remove(waiter)

    def keep(self, machines: Collection[Machine]) -> None:
        """What is ready and not among these is not there any more."""
        self.ready = deque(each for each in self.ready if each in machines)
