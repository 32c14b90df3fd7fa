"""The holder's side of the reader process: asks it without waiting on the event loop, and starts it again when it dies.

A question that was not answered when the reader died is asked of its successor: whoever faulted waits a little longer.
Nothing is lost with a reader, since it keeps nothing.
"""

import asyncio
import errno
import itertools
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
import structlog

from forkypig.pager import kept_key
from forkypig.pager.index import References
from forkypig.pager.reader import ANSWER, REQUEST

log = structlog.get_logger()

# An answer takes a millisecond, or what a disk needs that is very busy; after this the reader hangs, and is replaced.
_ANSWER_S = 30.0
# A question over which so many readers died in a row is what kills them: it fails, so that others are answered.
_MOST_DEATHS = 20
# From the second death without an answer between them on: a reader that can't start must not take all of the CPU.
_LONGEST_PAUSE_S = 1.0


class _Question:
    __slots__ = ("answer", "asked_s", "deaths", "message")

    def __init__(self, message: bytes, answer: asyncio.Future[bytearray]) -> None:
        self.message, self.answer = message, answer
        self.asked_s = time.monotonic()
        self.deaths = 0


class _Connection(asyncio.Protocol):
    """The socket to one reader process."""

    def __init__(self, link: "ReaderLink") -> None:
        self._link = link
        self._data = bytearray()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= ANSWER.size:
            number, code, length = ANSWER.unpack_from(self._data)
            end = ANSWER.size + length
            if len(self._data) < end:
                return
            content = self._data[ANSWER.size : end]
            del self._data[:end]
            self._link.answered(number, code, content)

    def connection_lost(self, error: Exception | None) -> None:
        self._link.died(self)


class ReaderLink:
    """A reader process, whichever it is at the moment."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._questions: dict[int, _Question] = {}  # in the order in which they were asked
        self._numbers = itertools.count(1)
        self._transport: asyncio.WriteTransport | None = None
        self._connection: _Connection | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._deaths = 0  # since the last answer
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the process; 0 when there is none just now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def start(self) -> None:
        """Starts the process; it need not be up when questions are asked."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "forkypig.pager.reader", str(theirs.fileno()), str(self._store)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *kept_key.descriptors()),
            )
        connection = _Connection(self)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: connection, sock=ours)
        self._connection, self._transport = connection, transport
        for question in self._questions.values():
            question.asked_s = time.monotonic()
            transport.write(question.message)
        log.info("reader started", pid=self._process.pid, asked_again=len(self._questions))

    async def close(self) -> None:
        """Ends the process; questions that are open fail."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
        for question in self._questions.values():
            if not question.answer.done():
                question.answer.set_exception(OSError(errno.EIO, "the pager is ending"))
        self._questions.clear()

    async def read(self, base: Path | None, references: list[int]) -> bytearray:
        """The pages at these references, zeros for 0. Raises OSError."""
        path = os.fsencode(base) if base is not None else b""
        count = len(references)
        return await self._ask(b"R" + struct.pack(f"<H{len(path)}s{count}Q", len(path), path, *references))

    async def will_need(self, references: list[int]) -> None:
        """These pages are asked for soon. Raises OSError."""
        await self._ask(b"W" + struct.pack(f"<{len(references)}Q", *references))

    async def expand(self, snapshot: str, section: str, first: int, count: int) -> References:
        """The references of the pages of `count` regions of a stored file. Raises OSError."""
        what = {"snapshot": snapshot, "section": section, "first": first, "count": count}
        return np.frombuffer(await self._ask(b"E" + json.dumps(what).encode()), "<u8")

    async def devices(self, snapshot: str) -> bytearray:
        """The device state of a stored snapshot. Raises OSError."""
        return await self._ask(b"D" + snapshot.encode())

    async def size(self) -> tuple[int, int]:
        """Bytes in packs, and the number of chunks. Raises OSError."""
        stored_bytes, chunks = json.loads(await self._ask(b"S"))
        return stored_bytes, chunks

    async def _ask(self, request: bytes) -> bytearray:
        if self._closed:
            raise OSError(errno.EIO, "the pager is ending")
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        question = _Question(REQUEST.pack(number, len(request)) + request, loop.create_future())
        self._questions[number] = question
        if self._transport is not None:
            self._transport.write(question.message)
        if self._watch is None:
            self._watch = loop.call_later(_ANSWER_S, self._look)
        return await question.answer

    def answered(self, number: int, code: int, content: bytearray) -> None:
        """An answer has come."""
        self._deaths = 0
        question = self._questions.pop(number, None)
        if question is None or question.answer.done():
            return
        if code:
            question.answer.set_exception(OSError(code, content.decode(errors="replace")))
        else:
            question.answer.set_result(content)

    def died(self, connection: _Connection) -> None:
        """The process has ended, or is about to."""
        if connection is not self._connection or self._closed:
            return
        self._connection = self._transport = None
        self._deaths += 1
        log.warning("reader died", open_questions=len(self._questions), deaths=self._deaths)
        for number, question in list(self._questions.items())[:1]:  # it answers in order: this one it was at
            question.deaths += 1
            if question.deaths >= _MOST_DEATHS:
                self.answered(number, errno.EIO, bytearray(b"readers die over it"))
        self._starting = asyncio.get_running_loop().create_task(self._start_again(), name="reader")

    async def _start_again(self) -> None:
        while True:
            if self._process is not None:
                if self._process.returncode is None:
                    self._process.kill()
                await self._process.wait()
            if self._deaths > 1:
                await asyncio.sleep(min(_LONGEST_PAUSE_S, 0.01 * 2.0 ** min(self._deaths, 10)))
            try:
                return await self.start()
            except OSError as error:  # no process or descriptor to be had
                self._deaths += 1
                log.error("reader can't be started", error=str(error))

    def _look(self) -> None:
        """Replaces a reader that has stood still."""
        self._watch = None
        oldest = next(iter(self._questions.values()), None)
        if oldest is None:
            return
        late_s = time.monotonic() - oldest.asked_s
        if late_s >= _ANSWER_S and self.pid:
            log.error("reader hangs and is replaced", seconds=round(late_s))
            assert self._process is not None
            self._process.kill()
            late_s = 0.0
        self._watch = asyncio.get_running_loop().call_later(_ANSWER_S - late_s, self._look)
