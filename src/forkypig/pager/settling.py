"""Settling one snapshot: its own pages go from the frozen process to its layer file.

The copying is a process of its own (copier.py), so that neither its CPU time nor Python's global lock makes a fault
wait. Here it is started, followed, and its failure is told.
"""

import array
import asyncio
import contextlib
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import structlog

from forkypig.errors import DeadlineExceeded, NotPossibleNow, ResourceExhausted
from forkypig.pager import copier
from forkypig.pager.index import PAGE_BYTES
from forkypig.pager.saved import Shelf
from forkypig.pager.snapshot import Snapshot

log = structlog.get_logger()

# The copier says something every 16 MiB. At the lowest priority on a busy host, or with a disk that is slow to sync,
# that may take long; this is for one that hangs.
_SILENCE_S = 300.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STEPS_WITHOUT_PAUSE = 64  # regions; 64 take about 0.5 ms


class Settling:
    """One settle operation, which several callers may follow."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.done_bytes = 0
        self.total_bytes = snapshot.own_bytes
        self.task: asyncio.Task[None] | None = None
        self._snapshot = snapshot
        self._news = asyncio.Event()

    def finish_at_once(self) -> None:
        """There is nothing to do."""
        self.done_bytes = self.total_bytes

    async def done(self) -> None:
        """Waits for the end; raises what went wrong. The operation goes on if the waiter is cancelled."""
        if self.task is not None:
            await asyncio.shield(self.task)

    async def follow(self) -> AsyncIterator[tuple[int, int]]:
        """Bytes done and bytes in all, whenever they change; ends with the operation, raising its error."""
        while self.task is not None and not self.task.done():
            yield self.done_bytes, self.total_bytes
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news, self.task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            self._news.clear()
        if self.task is not None:
            if self.task.cancelled():
                raise NotPossibleNow(f"{self._snapshot.id} was not settled: it is being forgotten")
            self.task.result()
        yield self.done_bytes, self.total_bytes

    async def copy(self, shelf: Shelf) -> None:
        """Writes the own pages to the part file, synced. Raises ResourceExhausted, NotPossibleNow (the process ended)
        or DeadlineExceeded; then the part file is gone and the snapshot is as it was."""
        snapshot = self._snapshot
        self.total_bytes = snapshot.own_bytes
        if shelf.free_bytes() < self.total_bytes:
            raise _disk_full(snapshot, self.total_bytes, shelf)
        ranges = await self._ranges()
        part = shelf.part(snapshot.id)
        try:
            with self.disk_errors(shelf):
                await self._run_copier(part, ranges, shelf)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def disk_errors(self, shelf: Shelf) -> Iterator[None]:
        """Tells what the disk refused in our words."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise _disk_full(self._snapshot, self.total_bytes, shelf) from error
            raise NotPossibleNow(
                f"{self._snapshot.id} can't be written to {shelf.directory}: {error.strerror}"
            ) from error

    async def _ranges(self) -> bytes:
        """Offset and length in bytes of the runs of own pages, in small steps: machines fault meanwhile."""
        index = self._snapshot.index
        ranges = array.array("q")
        for position in range(index.regions):
            for first, count in index.own_runs(position).tolist():
                if ranges and ranges[-2] + ranges[-1] == first * PAGE_BYTES:
                    ranges[-1] += count * PAGE_BYTES
                else:
                    ranges.extend((first * PAGE_BYTES, count * PAGE_BYTES))
            if position % _STEPS_WITHOUT_PAUSE == 0:
                await asyncio.sleep(0)
        return ranges.tobytes()

    async def _run_copier(self, part: Path, ranges: bytes, shelf: Shelf) -> None:
        assert self._snapshot.frozen is not None
        source, base = self._snapshot.frozen.file()
        target = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(target, self._snapshot.size_bytes)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(Path(copier.__file__)), str(source), str(base), str(target)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(source, target),
            )
        finally:
            os.close(target)
        try:
            status = await self._follow_copier(process, ranges)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if status in _FULL:
            raise _disk_full(self._snapshot, self.total_bytes, shelf)
        if status != 0:
            reason = os.strerror(status) if status > 0 else f"ended by signal {-status}"
            raise NotPossibleNow(f"the memory of {self._snapshot.id} could not be copied: {reason}")

    async def _follow_copier(self, process: asyncio.subprocess.Process, ranges: bytes) -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(ranges)
        process.stdin.close()
        while True:
            try:
                line = await asyncio.wait_for(process.stdout.readline(), _SILENCE_S)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"copying the memory of {self._snapshot.id} stood still for {_SILENCE_S:.0f} s: is the disk hung?"
                ) from error
            if not line:
                return await process.wait()
            self.done_bytes = int(line)
            self._news.set()


def _disk_full(snapshot: Snapshot, needed_bytes: int, shelf: Shelf) -> ResourceExhausted:
    return ResourceExhausted(
        f"{snapshot.id} can't be written to disk: {shelf.directory} has {shelf.free_bytes() >> 20} MiB free and up to "
        f"{needed_bytes >> 20} MiB are needed; free some and settle it again (until then it stays in memory)"
    )
