"""Which pages are touched after a split, and pushing them into the page cache ahead of the next one.

Loading device state reads a few dozen guest pages (rings, tables), each a round trip through FUSE inside the machine's
pause; then the guest runs on, and stands still for every page of its working set. Both are nearly the same in every
generation. So the reads from Bind until shortly after EndOfLoad are recorded, and a snapshot that is made of a
descendant has these pages stored by FUSE_NOTIFY_STORE: the first ones as soon as it is bound, the others when its
load is over, so that they don't keep the load waiting. What a start from a packed snapshot touched is kept on disk, and
what of it the page cache has lost is pushed when the next one begins.

notify_store waits for the lock of a page that a pending read holds, and only the event loop can answer that read: so it
is never called there, but on a thread of its own (pyfuse3 releases the GIL in it). An answer needs nothing of that
thread, so the two can't wait for each other.
"""

from collections.abc import Iterable

from forkypig.chunks.format import PAGE_BYTES
from forkypig.pager.index import PageRun

# Reads that come later than this after the first one are no start of anything.
_LONGEST_S = 1.0
# From a packed snapshot all that a start touches is far away: what a first command in the child needs is recorded too.
PACKED_LONGEST_S = 4.0
# A load touches some dozen pages, in read-ahead's pieces of 32 KiB. Pauses over 12 to 16 generations (medians, ms):
# nothing pushed 33 to 45, 128 pages 27, 256 pages 24 to 28, 512 33, 2048 29.
_LOAD_PAGES = 256
_MOST_PAGES = 4096
_PACKED_MOST_PAGES = 8192
# Whether a pushed page is used nobody sees. So one run in so many is left out in turn: it is asked for if it is still
# used, and comes back; else it is off the list.
_LEFT_OUT_OF = 8


class Recording:
    """The pages that were asked for when machines started from a snapshot."""

    def __init__(self) -> None:
        self.on = False
        self._pages: dict[int, None] = {}  # an ordered set
        self._until = 0.0
        self._longest_s, self._most_pages = _LONGEST_S, _MOST_PAGES

    @classmethod
    def of(cls, runs: Iterable[PageRun]) -> "Recording":
        """One that is finished."""
        recording = cls()
        recording._pages = dict.fromkeys(page for first, count in runs for page in range(first, first + count))
        return recording

    def start(self, pushed: Iterable[PageRun]) -> None:
        """Begins. Pages that are pushed ahead are not asked for, but belong to the list."""
        self._pages = {}
        self._until = 0.0
        self.on = True
        self.expect(pushed)

    @classmethod
    def of_packed(cls, runs: Iterable[PageRun]) -> "Recording":
        """One that is on, of a start from a packed snapshot, for which these pages are there."""
        recording = cls.of(runs)
        recording._longest_s, recording._most_pages = PACKED_LONGEST_S, _PACKED_MOST_PAGES
        recording.on = True
        return recording

    def expect(self, pushed: Iterable[PageRun]) -> None:
        """More is pushed."""
        self._pages.update(dict.fromkeys(page for first, count in pushed for page in range(first, first + count)))

    def add(self, offset: int, length: int, now_s: float) -> None:
        """A read of [offset, offset + length) bytes."""
        self._until = self._until or now_s + self._longest_s
        pages = range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))
        if now_s > self._until or len(self._pages) + len(pages) > self._most_pages:
            self.on = False
            return
        self._pages.update(dict.fromkeys(pages))

    def finish(self) -> None:
        """The start is over."""
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


def split(runs: Iterable[PageRun], turn: int) -> tuple[tuple[PageRun, ...], tuple[PageRun, ...]]:
    """What to push at once, and what when the load is over. `turn` is another number at each split."""
    at_once: list[PageRun] = []
    later: list[PageRun] = []
    pages = 0
    for position, run in enumerate(runs):
        if pages + run[1] <= _LOAD_PAGES and not later:
            at_once.append(run)
            pages += run[1]
        elif (position + turn) % _LEFT_OUT_OF:
            later.append(run)
    return tuple(at_once), tuple(later)
