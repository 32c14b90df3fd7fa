"""Runs `python -m forkypig.archive` for one transfer, and follows what it says."""

import asyncio
import base64
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from forkypig import errors
from forkypig.archive.frames import DATA, FRAME, MOST
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError, InternalError
from forkypig.model import Progress

log = structlog.get_logger()

_END_S = 10.0  # a process that was killed ends at once, unless a disk holds it


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an export."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Data:
    """Some bytes of an export."""

    content: bytes


@dataclass(frozen=True, slots=True)
class MovedChunks:
    """Chunks are elsewhere now, as this file says; the worker waits until `feed` says `told`."""

    path: Path


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it: the last thing."""

    fields: Mapping[str, Any]


Said = Progress | Head | Data | MovedChunks | Result


async def work(
    settings: Settings, do: str, *, feed: AsyncIterator[bytes] | None = None, **request: Any
) -> AsyncGenerator[Said, None]:
    """What a worker says that does this. `feed`: what it reads, such as the file of an import. Leaving early ends the
    worker, which leaves every snapshot whole. Raises what the worker raised, InternalError when it died."""
    request |= {
        "do": do,
        "store": str(settings.store),
        "images": str(settings.images),
        "cache": str(settings.home / "cache" / "remotes"),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forkypig.archive"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2 * MOST,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    feeding: asyncio.Task[None] | None = None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        feeding = asyncio.create_task(_feed(process.stdin, feed), name=f"feed-{do}")
        async for said in _follow(process.stdout, do):
            yield said
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if feeding is not None:
            feeding.cancel()
            await asyncio.wait({feeding})
        process.stdin.close()
        with contextlib.suppress(ConnectionError):  # it ended before it had read all
            async with asyncio.timeout(_END_S):
                await process.wait()
                await process.stdin.wait_closed()


async def _feed(stdin: asyncio.StreamWriter, feed: AsyncIterator[bytes] | None) -> None:
    """Ends the file only when the caller has ended it: one that goes away must not look like one that is done."""
    with contextlib.suppress(ConnectionError):  # the worker knows enough already, and says so
        if feed is not None:
            async for piece in feed:
                stdin.write(piece)
                await stdin.drain()
        stdin.close()


async def _follow(stdout: asyncio.StreamReader, do: str) -> AsyncGenerator[Said, None]:
    while True:
        try:
            kind, length = FRAME.unpack(await stdout.readexactly(FRAME.size))
            content = await stdout.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise InternalError(f"the process that was to {do} ended: hostd's log says more") from error
        if kind == DATA:
            yield Data(content)
            continue
        event = json.loads(content)
        if "progress" in event:
            yield Progress(*event["progress"])
        elif "head" in event:
            yield Head(base64.b64decode(event["head"]))
        elif "moved" in event:
            yield MovedChunks(Path(event["moved"]))
        elif "result" in event:
            yield Result(event["result"])
            return
        else:
            name, message = event["error"]
            raise _error(name, message)


def _error(name: str, message: str) -> ForkyError:
    """What the worker raised."""
    cls = getattr(errors, name, InternalError)
    error: ForkyError = cls.__new__(cls)
    Exception.__init__(error, message)
    return error
