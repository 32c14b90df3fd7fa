"""Starts of machines from snapshots: what they touch is recorded, and pushed ahead of the next one (prefetch.py)."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from forkypig.pager import cache, prefetch
from forkypig.pager.content import Content
from forkypig.pager.index import PageRun
from forkypig.pager.prefetch import Recording
from forkypig.pager.served import FileKind
from forkypig.pager.shelf import Shelf
from forkypig.pager.snapshot import Snapshot, State

log = structlog.get_logger()

# The guest's first moments after a load, in which it stands still for each page that it needs.
_START_S = 0.4
# 256 KiB are read and go to the kernel at a time: a fault that comes in between waits for a millisecond at most.
_PAGES_A_STEP = 64
_FEW_PAGES = 32  # less than that is not worth a push


def _steps(runs: Sequence[PageRun]) -> Iterator[list[PageRun]]:
    """The runs in steps of some pages each, in order."""
    step: list[PageRun] = []
    pages = 0
    for run in runs:
        step.append(run)
        pages += run[1]
        if pages >= _PAGES_A_STEP:
            yield step
            step, pages = [], 0
    if step:
        yield step


class Starts:
    """Recordings and pushes. Everything here runs on the event loop, but for the storing."""

    def __init__(self, content: Content, shelf: Shelf, mount: Path) -> None:
        self.content, self._shelf, self._mount = content, shelf, mount
        self.store: Callable[[int, int, bytes | bytearray], None] = lambda *_: None  # into the page cache (fuse.py)
        self._pusher = ThreadPoolExecutor(1, "push")
        self._pusher.submit(int)  # starts the thread: hostd raises the priority of those that are there at a split
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning: set[str] = set()  # snapshots whose cached pages are looked at or pushed
        self._turns = itertools.count()
        self._last_touched: dict[int, tuple[PageRun, ...]] = {}  # by size: for snapshots without a parent

    def bound(self, snapshot: Snapshot) -> None:
        """It is frozen, and its machine's successor is about to load it. Inside the machine's pause."""
        last = self._last_touched.get(snapshot.size_bytes, ())
        ahead = snapshot.parent.recording.runs if snapshot.parent else last
        at_once, snapshot.push_later = prefetch.split(ahead, next(self._turns))
        snapshot.recording.start(at_once)
        if at_once:
            self._spawn(self._push(snapshot, at_once))

    def begins(self, snapshot: Snapshot) -> None:
        """A process has opened a packed snapshot's memory. Once for those that begin together."""
        if snapshot.recording.runs and snapshot.id not in self._beginning:
            self._beginning.add(snapshot.id)
            self._spawn(self._begin(snapshot))

    def end_of_load(self, snapshot: Snapshot) -> None:
        """The load is over, and the machine runs."""
        later, snapshot.push_later = snapshot.push_later, ()
        if snapshot.state is State.FROZEN and later:
            snapshot.recording.expect(later)
            self._spawn(self._push(snapshot, later))
        if snapshot.state is State.FROZEN and snapshot.recording.on:
            self._spawn(self._end(snapshot))

    async def close(self) -> None:
        """Ends what goes on."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._pusher.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, snapshot: Snapshot) -> None:
        runs = snapshot.recording.runs
        try:
            # Machines that run keep in the cache what they have only read. What they have written is their own, and may
            # have left the cache: of that a new one has all to read.
            missing = await asyncio.to_thread(cache.missing, self._mount / snapshot.id / FileKind.MEMORY.value, runs)
            if sum(count for _, count in missing) < _FEW_PAGES:
                return
            if not snapshot.recording.on:
                snapshot.recording = Recording.of_packed(runs)
                self._spawn(self._end_of_packed(snapshot, snapshot.recording, runs))
            with contextlib.suppress(OSError):  # whoever reads meets it again, and says it
                await self.content.will_need(snapshot.memory, missing)
            await self._push(snapshot, missing)
        finally:
            self._beginning.discard(snapshot.id)

    async def _end_of_packed(self, snapshot: Snapshot, recording: Recording, runs: tuple[PageRun, ...]) -> None:
        await asyncio.sleep(prefetch.PACKED_LONGEST_S)
        # What was read first is worth the most: the list is of use also where there was more than it holds.
        recording.finish()
        if recording.runs != runs and snapshot.state is State.PACKED:
            await asyncio.to_thread(self._shelf.save_touched, snapshot.id, recording.runs)

    async def _end(self, snapshot: Snapshot) -> None:
        await asyncio.sleep(_START_S)
        snapshot.recording.finish()
        runs = self._last_touched[snapshot.size_bytes] = snapshot.recording.runs
        log.info("started", snapshot=snapshot.id, touched_pages=sum(count for _, count in runs))
        if snapshot.state is State.PACKED:
            await asyncio.to_thread(self._shelf.save_touched, snapshot.id, runs)

    async def _push(self, snapshot: Snapshot, ahead: Sequence[PageRun]) -> None:
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        storing: list[asyncio.Future[int]] = []  # while the next step is read
        for step in _steps(ahead):
            try:
                parts = await self.content.read_runs(snapshot.memory, step)
            except OSError as error:  # it is read as usual then, and fails there
                log.warning("not pushed", snapshot=snapshot.id, first=step[0], error=str(error))
                continue
            storing.append(loop.run_in_executor(self._pusher, self._store_all, snapshot.memory.node, parts))
            await asyncio.sleep(0)  # frozen pages are read without waiting: a fault has its turn in between
        stored = sum(await asyncio.gather(*storing))
        took_ms = (time.perf_counter() - began) * 1000
        log.debug("pushed", snapshot=snapshot.id, kib=stored >> 10, ms=round(took_ms, 2))

    def _store_all(self, node: int, parts: list[tuple[int, bytearray]]) -> int:
        """On the pusher's thread; returns how many bytes. What fails is left out: the page is then read as usual."""
        stored = 0
        for offset, data in parts:
            with contextlib.suppress(OSError):  # ENOENT: nobody has opened the file yet
                self.store(node, offset, data)
                stored += len(data)
        return stored

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error)
