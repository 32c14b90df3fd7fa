"""What is under way: operations in tasks of their own, each with its intent.

A caller that goes away (Ctrl-C, a deadline, a broken connection) cancels its call, not the operation. What makes
machines (run, fork) then sees `Caller.left` and is undone; everything else is carried to its end.

When the controller itself ends, its tasks are cancelled where they are. Nothing is cleaned up on that path: the intent
stays open, which is what the next controller needs to know.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import structlog

from forkypig.controller import retried
from forkypig.core.intents import Intent, IntentKind
from forkypig.core.lifecycle import Action
from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.model import Machine

log = structlog.get_logger()
T = TypeVar("T")

ENDING = "the controller is ending: what was begun is finished or undone when it runs again (forky up)"

_MAKING = {
    IntentKind.RUN: "creating",
    IntentKind.FORK: "creating",
    IntentKind.REMOVE_MACHINE: Action.REMOVE.value,
}


def operations_of(under_way: Iterable[Intent]) -> dict[str, str]:
    """What these do, by machine id: "forking"."""
    doing: dict[str, str] = {}
    for intent in under_way:
        if intent.source is not None:
            doing[intent.source] = str(intent.arguments.get("action", Action.FORK.value))
        for machine in intent.machines:
            doing[machine] = _MAKING.get(intent.kind, "")
    return doing


class Caller:
    """Who asked for an operation, as far as the operation has to know: whether they still wait."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    def check(self) -> None:
        """Raises NotPossibleNow when they have left. Nobody reads the message but the log."""
        if self.left.is_set():
            raise NotPossibleNow("the caller has gone away: undone")

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the caller leaves; then raises as `check`."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self.left.wait())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.check()
            return await task
        finally:
            for one in (task, leaving):
                one.cancel()
            await asyncio.wait({task, leaving})


class Flight:
    """An operation that is under way."""

    def __init__(self, journal: "Journal") -> None:
        self._journal = journal
        self.intents: list[Intent] = []

    def take(self, intent: Intent) -> Intent:
        """From here on it is under way. To be called in the transaction that writes it down: once that is committed
        others could take it for left over."""
        self.intents.append(intent)
        self._journal.hold(intent)
        return intent

    def land(self) -> None:
        """It is over, or up to the reconciler."""
        for intent in self.intents:
            self._journal.release(intent)
        self.intents.clear()


class Journal:
    """All operations that are under way in this process."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._running: dict[int, Intent] = {}
        self._named: Counter[str] = Counter()  # how many of them are about an id
        self._observers: list[set[str]] = []
        self._work: set[asyncio.Task[None]] = set()
        # Known here to have failed although the database could not be told.
        self.failed: set[int] = set()
        self.why_stopped = ENDING

    # -- intents -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def flight(self) -> Iterator[Flight]:
        flight = Flight(self)
        try:
            yield flight
        finally:
            flight.land()

    def hold(self, intent: Intent) -> None:
        self._running[intent.id] = intent
        self._named.update(intent.names)
        for observed in self._observers:
            observed |= intent.names

    def release(self, intent: Intent) -> None:
        if self._running.pop(intent.id, None) is not None:
            self._named -= Counter(intent.names)

    def is_under_way(self, intent: Intent) -> bool:
        return intent.id in self._running

    def concerns(self, thing: str) -> bool:
        """Whether an operation under way is about this id."""
        return thing in self._named

    @contextlib.contextmanager
    def touched(self) -> Iterator[set[str]]:
        """The ids that operations were about at any time during the block."""
        observed: set[str] = set()
        for intent in self._running.values():
            observed |= intent.names
        self._observers.append(observed)
        try:
            yield observed
        finally:
            self._observers = [other for other in self._observers if other is not observed]

    def operations(self) -> dict[str, str]:
        """What is being done now, by machine id: "forking"."""
        return operations_of(self._running.values())

    def operation_on(self, machine: Machine) -> str:
        return self.operations().get(machine.id, "") if self.concerns(machine.id) else ""

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def carry(self, work: Coroutine[Any, Any, T], caller: Caller | None = None) -> T:
        """Runs `work` in a task of its own and waits. When the waiting is cancelled the work goes on, and `caller`
        is marked as gone."""
        outcome = self.begin(work)
        try:
            return await self.told(outcome)
        except asyncio.CancelledError:
            if caller is not None and not outcome.done():
                caller.left.set()
            raise

    async def told(self, outcome: asyncio.Future[T]) -> T:
        """What became of work that was begun, which goes on when the waiting is cancelled. Raises NotPossibleNow where
        the work was stopped."""
        task = asyncio.current_task()
        assert task is not None
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            # Both are cancelled at once as the controller ends: a loop that took this for an error would never end.
            if outcome.cancelled() and not task.cancelling():
                raise NotPossibleNow(self.why_stopped) from None
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Runs `work` in a task of its own; its result or error is the future's, never the group's."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(_look)
        retried.note_work(outcome)
        task = self._tasks.create_task(_deliver(work, outcome))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return outcome

    async def stop(self, why: str = ENDING) -> None:
        """Stops everything where it is. Before the callers' calls are cancelled, which would have it undone.
        `why`: what those who wait are told."""
        self.why_stopped = why
        for task in list(self._work):
            task.cancel()
        if self._work:
            await asyncio.wait(list(self._work))


async def _deliver(work: Coroutine[Any, Any, T], outcome: asyncio.Future[T]) -> None:
    try:
        result = await work
    except asyncio.CancelledError:
        outcome.cancel()
        raise
    except Exception as error:
        if not isinstance(error, ForkyError):
            log.exception("operation failed")
        if not outcome.done():
            outcome.set_exception(error)
    else:
        if not outcome.done():
            outcome.set_result(result)


def _look(outcome: asyncio.Future[Any]) -> None:
    """Takes notice of an error that nobody may wait for any more."""
    if not outcome.cancelled() and (error := outcome.exception()) is not None:
        log.info("operation ended with an error", error=str(error))
