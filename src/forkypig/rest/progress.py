"""Long operations: one answer at their end, or, for a caller that accepts text/event-stream, progress as it comes.

Of a stream that has begun the status can't be changed any more, so its last event is `result` or `problem`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from forkypig import errors, model
from forkypig.rest import problems
from forkypig.rest.presence import while_there

T = TypeVar("T")
OnProgress = Callable[[model.Progress], None]
EVENT_STREAM = "text/event-stream"
# Proxies give up on a connection that is silent for a minute.
_SILENCE_S = 15.0
_NOT_KEPT = {"Cache-Control": "no-store"}
log = structlog.get_logger()


def wants_stream(request: Request) -> bool:
    """Whether the caller prefers events to one answer: it names them and not JSON before them."""
    accept = request.headers.get("accept", "")
    offered = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    return EVENT_STREAM in offered and "application/json" not in offered[: offered.index(EVENT_STREAM)]


def event(kind: str, document: Any, number: int | None = None) -> bytes:
    """One server-sent event (HTML, section 9.2)."""
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {kind}\ndata: {json.dumps(document)}\n\n".encode()


async def answered(
    request: Request,
    work: Callable[[OnProgress], Coroutine[Any, Any, BaseModel]],
    *,
    status: int = 200,
    location: Callable[[Any], str] | None = None,
) -> Response:
    """The response to a long operation, in the form that the caller wants."""
    if wants_stream(request):
        return StreamingResponse(_events(work), media_type=EVENT_STREAM, headers=_NOT_KEPT)
    made = await while_there(request, work(lambda _: None))
    headers = {"Location": location(made)} if location is not None else {}
    return JSONResponse(made.model_dump(mode="json"), status_code=status, headers=headers)


async def _events(work: Callable[[OnProgress], Coroutine[Any, Any, BaseModel]]) -> AsyncGenerator[bytes, None]:
    """Progress, then the end. A caller that leaves the stream ends its call; what was begun goes on or is undone as
    the controller does it for any caller that goes away."""
    updates: asyncio.Queue[model.Progress | None] = asyncio.Queue()
    working = asyncio.create_task(work(updates.put_nowait))
    working.add_done_callback(lambda _: updates.put_nowait(None))
    try:
        async for update in alive(updates.get):
            if update is None:
                break
            if isinstance(update, bytes):
                yield update
            else:
                yield event("progress", {"step": update.step, "done": update.done, "total": update.total})
        try:
            yield event("result", (await working).model_dump(mode="json"))
        except errors.ForkyError as error:
            yield event("problem", problems.document(error))
        except Exception as error:
            log.error("call failed", exc_info=error)
            yield event("problem", problems.document(unexpected(error)))
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


def streamed(events: AsyncGenerator[bytes, None]) -> Response:
    """Events without end, as they come; a comment while there is none, and `problem` where they break off."""
    return StreamingResponse(_living(events), media_type=EVENT_STREAM, headers=_NOT_KEPT)


async def _living(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        try:
            async with contextlib.aclosing(alive(lambda: anext(events, None))) as pieces:
                async for piece in pieces:
                    if piece is None:
                        return
                    yield piece
        except errors.ForkyError as error:
            yield event("problem", problems.document(error))


async def alive(take: Callable[[], Awaitable[T]]) -> AsyncGenerator[T | bytes, None]:
    """What `take` gives, for ever; a comment in its place while that takes long."""
    taking: asyncio.Future[T] | None = None
    try:
        while True:
            taking = taking or asyncio.ensure_future(take())
            done, _ = await asyncio.wait([taking], timeout=_SILENCE_S)
            if done:
                yield taking.result()
                taking = None
            else:
                yield b": still at it\n\n"
    finally:
        if taking is not None:
            taking.cancel()
            # Whoever gives these things is closed next, which must not be while it runs.
            await asyncio.wait([taking])


def unexpected(error: BaseException) -> errors.InternalError:
    """What a caller learns of a defect of ours."""
    return errors.InternalError(f"an unexpected error ({type(error).__name__}): the log of rest says more")
