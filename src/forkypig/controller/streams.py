"""Streams: progress while an operation is under way, and its result at last; requests whose first has been read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from forkypig.controller.journal import Caller, Journal
from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model import Progress

T = TypeVar("T")
ShowProgress = Callable[[Progress], None]


async def progressing(
    journal: Journal, work: Callable[[ShowProgress], Coroutine[Any, Any, T]], caller: Caller
) -> AsyncGenerator[Progress | T, None]:
    """Runs `work` in a task of its own; a stream that is left marks `caller` as gone, and the work goes on."""
    updates: asyncio.Queue[Progress | None] = asyncio.Queue()
    outcome = journal.begin(work(updates.put_nowait))
    outcome.add_done_callback(lambda _: updates.put_nowait(None))
    try:
        while (progress := await updates.get()) is not None:
            yield progress
        yield await outcome
    except asyncio.CancelledError:
        if outcome.cancelled():
            raise NotPossibleNow(journal.why_stopped) from None
        raise
    finally:
        if not outcome.done():
            caller.left.set()


async def first_of(requests: AsyncIterator[T]) -> T:
    """What a stream of requests begins with. Raises InvalidRequest where there is nothing."""
    try:
        return await anext(requests)
    except StopAsyncIteration as error:
        raise InvalidRequest("the call ended before it said what to do") from error


async def resumed(first: T, rest: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The whole stream again."""
    yield first
    async for request in rest:
        yield request
