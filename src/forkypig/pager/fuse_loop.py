"""pyfuse3's loop on asyncio, without a detour.

pyfuse3 asks a module that it calls `trio` for a handful of things, and `pyfuse3.asyncio` is its own substitute. Ours
differs where a page fault is paid for: it looks whether a request is there before it goes to sleep, and it leaves the
reader registered with the event loop (measured: a fault in 105 instead of 170 µs). And it makes the descriptor
non-blocking: a request whose process is killed between «readable» and read vanishes, and reading would then block the
whole event loop, until some other request comes, which may never be.
"""

import asyncio
import errno
import os
import select
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pyfuse3

# Each read of a snapshot that is not bound holds a worker until it is: with pyfuse3's 99 the rest would stop.
_MAX_WORKERS = 1_000_000
# After so many requests in one go the event loop's other work has its turn.
_AT_ONCE = 16


class _Closed(Exception):
    """pyfuse3 ends its loop."""


class _Descriptor:
    """Waits for requests on /dev/fuse. One waiter at a time: pyfuse3 holds its lock over it."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll = select.poll()
        self._waiter: asyncio.Future[None] | None = None
        self._served = 0
        self._closing = False

    async def wait_readable(self, fd: int) -> None:
        if self._closing:
            raise _Closed
        if fd != self._fd:
            os.set_blocking(fd, False)
            self._fd = fd
            self._poll.register(fd, select.POLLIN)
        if self._served < _AT_ONCE and self._poll.poll(0):
            self._served += 1
            return
        self._served = 0
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, self._readable)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _readable(self) -> None:
        if self._waiter is None:
            asyncio.get_running_loop().remove_reader(self._fd)  # nobody waits: don't spin
        elif not self._waiter.done():
            self._waiter.set_result(None)

    def notify_closing(self, fd: int) -> None:
        self._closing = True
        asyncio.get_running_loop().remove_reader(fd)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(_Closed())


class _Nursery:
    """Runs pyfuse3's workers in a task group. One that finds its request gone (EAGAIN) starts anew."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> "_Nursery":
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._group.__aexit__(*details)

    def start_soon(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any, name: str = "") -> None:
        self._group.create_task(self._worker(work, arguments), name=name)

    async def _worker(self, work: Callable[..., Coroutine[Any, Any, None]], arguments: tuple[Any, ...]) -> None:
        while True:
            try:
                return await work(*arguments)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise


def enable() -> None:
    """Before `pyfuse3.init`."""
    descriptor = _Descriptor()
    lowlevel = SimpleNamespace(
        wait_readable=descriptor.wait_readable,
        notify_closing=descriptor.notify_closing,
        current_task=lambda: SimpleNamespace(name="fuse"),
        current_trio_token=lambda: "asyncio",
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        lowlevel=lowlevel,
        Lock=asyncio.Lock,
        ClosedResourceError=_Closed,
        open_nursery=_Nursery,
    )


async def run() -> None:
    """Answers FUSE requests until the file system is unmounted or `pyfuse3.terminate` is called."""
    await pyfuse3.main(min_tasks=1, max_tasks=_MAX_WORKERS)
