"""Which pages the load of a snapshot touches, and pushing them into the page cache ahead of the next load.

Loading device state reads a few dozen guest pages (rings, tables), each a round trip through FUSE inside the machine's
pause, and at the same places in every generation. So the reads between Bind and EndOfLoad are recorded, and the
snapshots that are made of the descendants have these pages stored by FUSE_NOTIFY_STORE as soon as they are bound.

notify_store waits for the lock of a page that a pending read holds, and only the event loop can answer that read: so it
is never called there, but on a thread of its own (pyfuse3 releases the GIL in it). An answer needs nothing of that
thread, so the two can't wait for each other.
"""

import contextlib
import time
from collections.abc import Callable, Iterable

import pyfuse3

from forkypig.pager.index import PAGE_BYTES, PageRun

# A load ends with EndOfLoad. Where nobody says so (the first load of a template), reads this long after the first
# one are the guest's.
_LONGEST_LOAD_S = 1.0
# A load touches some dozen pages, in read-ahead's pieces of 32 KiB; what follows is the guest that runs. Pauses over 12
# to 16 generations (medians, ms): nothing pushed 33 to 45, 128 pages 27, 256 pages 24 to 28, 512 33, 2048 29.
_MOST_PAGES = 256


class Recording:
    """The pages that were asked for while a snapshot was loaded."""

    def __init__(self) -> None:
        self.on = False
        self._pages: dict[int, None] = {}  # an ordered set
        self._until = 0.0

    @classmethod
    def of(cls, runs: Iterable[PageRun]) -> "Recording":
        """One that is finished."""
        recording = cls()
        recording._pages = dict.fromkeys(page for first, count in runs for page in range(first, first + count))
        return recording

    def start(self, pushed: Iterable[PageRun]) -> None:
        """Begins. Pages that are pushed ahead are not asked for, but belong to the list."""
        self._pages = dict.fromkeys(page for first, count in pushed for page in range(first, first + count))
        self._until = 0.0
        self.on = True

    def add(self, offset: int, length: int, now_s: float) -> None:
        """A read of [offset, offset + length) bytes."""
        self._until = self._until or now_s + _LONGEST_LOAD_S
        pages = range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))
        if now_s > self._until or len(self._pages) + len(pages) > _MOST_PAGES:
            self.on = False
            return
        self._pages.update(dict.fromkeys(pages))

    def stop(self) -> None:
        self.on = False

    @property
    def runs(self) -> tuple[PageRun, ...]:
        """The pages as runs, in the order in which they were asked for first: a push has to stay ahead of the load."""
        runs: list[PageRun] = []
        for page in self._pages:
            if runs and runs[-1][0] + runs[-1][1] == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        return tuple(runs)


def push(inode: int, runs: Iterable[PageRun], content: Callable[[int, int], bytes]) -> tuple[int, float]:
    """Stores `runs` of a file in the kernel's page cache; returns how many bytes, and the time in ms.

    For a thread of its own. `content(offset, length)` reads. What fails is left out: the page is then read as usual.
    """
    began = time.perf_counter()
    stored = 0
    for first, count in runs:
        # OSError: nobody has opened the file yet (ENOENT), or the content can't be read.
        with contextlib.suppress(OSError):
            pyfuse3.notify_store(inode, first * PAGE_BYTES, content(first * PAGE_BYTES, count * PAGE_BYTES))
            stored += count * PAGE_BYTES
    return stored, (time.perf_counter() - began) * 1000
