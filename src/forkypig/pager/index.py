"""For each 4 KiB page of a snapshot: the number of the layer that holds it. One look-up, whatever the depth.

The index of a live snapshot is made region by region when it is first needed, so that a freeze costs nothing whatever
the memory's size: one small read of pagemap, merged over the parent's region by numpy. A region without own pages is
the parent's array itself. Numbers are of the process (LayerTable), so that arrays can be shared between snapshots.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
REGION_PAGES = 512  # 2 MiB: pagemap of it is one 4 KiB read, about 20 µs
REGION_BYTES = REGION_PAGES * PAGE_BYTES
NO_OWNER = 0  # a page that no layer holds reads as zeros

Owners = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]
PageRun = tuple[int, int]  # first page, number of pages


def _frozen(owners: Owners) -> Owners:
    owners.flags.writeable = False  # regions are shared between snapshots
    return owners


_EMPTY: Owners = _frozen(np.zeros(REGION_PAGES, np.uint16))


class OwnPages(Protocol):
    """Tells which pages a layer holds."""

    def own_pages(self, first: int, count: int) -> Mask:
        """For `count` pages from `first`, whether they are its own. Raises OSError when it can't be told."""


def merged(below: Owners, own: Mask, number: int) -> Owners:
    """The owners after a layer `number` with the pages `own` was laid over `below`; `below` itself if it has none."""
    if not own.any():
        return below
    return _frozen(np.where(own, np.uint16(number), below))


def runs_of(mask: Mask) -> npt.NDArray[np.int64]:
    """The runs of True in `mask`, as rows of (first, length)."""
    padded = np.zeros(len(mask) + 2, np.int8)
    padded[1:-1] = mask
    edges = np.flatnonzero(np.diff(padded))
    starts, ends = edges[::2], edges[1::2]
    return np.stack([starts, ends - starts], axis=1).astype(np.int64)


class PageIndex:
    """The index of one snapshot."""

    def __init__(self, size_bytes: int, number: int, parent: "PageIndex | None", own: OwnPages | None) -> None:
        """`own` is None for an index whose regions are all given (`from_owners`)."""
        self.pages = size_bytes // PAGE_BYTES
        self.number = number
        self.own_page_count = 0  # as far as the index is made
        self._parent = parent
        self._own = own
        self._regions: list[Owners | None] = [None] * -(-self.pages // REGION_PAGES)
        self.complete = False

    @classmethod
    def from_owners(cls, owners: Owners, number: int, parent: "PageIndex | None") -> "PageIndex":
        """A complete index, from the owner of each page. Regions that are the same in `parent` are shared with it."""
        index = cls(len(owners) * PAGE_BYTES, number, None, None)
        for position in range(len(index._regions)):
            region = owners[position * REGION_PAGES : (position + 1) * REGION_PAGES]
            index._regions[position] = index._shared(region, parent, position)
        index.all_made()
        return index

    @staticmethod
    def _shared(region: Owners, parent: "PageIndex | None", position: int) -> Owners:
        if parent is not None and parent.pages > position * REGION_PAGES:
            other = parent._regions[position]
            if other is not None and np.array_equal(other, region):
                return other
        return _EMPTY[: len(region)] if not region.any() else _frozen(region.copy())

    @property
    def regions(self) -> int:
        """How many regions there are."""
        return len(self._regions)

    def owners(self, first: int, count: int) -> list[int]:
        """The owners of `count` pages from `first`. Raises OSError when a frozen process can't be asked."""
        found: list[int] = []
        while count > 0:
            position, start = divmod(first, REGION_PAGES)
            region = self._regions[position]
            if region is None:
                region = self._make(position)
            part = region[start : start + count].tolist()
            found += part
            first += len(part)
            count -= len(part)
        return found

    def complete_step(self, position: int, count: int) -> None:
        """Makes up to `count` regions from `position` with one question to the process. The parent is complete."""
        end = min(position + count, len(self._regions))
        if all(region is not None for region in self._regions[position:end]):
            return
        first = position * REGION_PAGES
        own = self._ask(first, min(end * REGION_PAGES, self.pages) - first)
        for at in range(position, end):
            if self._regions[at] is None:
                self._lay(at, own[(at - position) * REGION_PAGES : (at - position + 1) * REGION_PAGES])

    def all_made(self) -> None:
        """Every region is made: the index needs neither its parent nor the process any more."""
        assert all(region is not None for region in self._regions)
        self.complete = True
        self._parent = self._own = None
        counts = {id(region): np.count_nonzero(region == self.number) for region in self._regions if region is not None}
        self.own_page_count = int(sum(counts[id(region)] for region in self._regions))

    def named(self) -> set[int]:
        """The numbers of all layers that the (complete) index names."""
        distinct = {id(region): region for region in self._regions if region is not None}
        numbers: set[int] = set()
        for region in distinct.values():
            numbers.update(np.unique(region).tolist())
        numbers.discard(NO_OWNER)
        return numbers

    def own_runs(self, position: int) -> npt.NDArray[np.int64]:
        """The runs of own pages in a region of the (complete) index, as rows of (first page, length)."""
        region = self._regions[position]
        assert region is not None
        runs = runs_of(region == self.number)
        runs[:, 0] += position * REGION_PAGES
        return runs

    def as_array(self) -> Owners:
        """The owner of each page; the index is complete."""
        return np.concatenate([region for region in self._regions if region is not None])

    def _make(self, position: int) -> Owners:
        """Makes one region, and that of each ancestor that lacks it (a loop: chains may be thousands deep)."""
        chain: list[PageIndex] = [self]
        while (parent := chain[-1]._parent) is not None and parent._regions[position] is None:
            chain.append(parent)
        first = position * REGION_PAGES
        count = min(REGION_PAGES, self.pages - first)
        for index in reversed(chain):
            if index._regions[position] is None:  # the prefetch thread may have been faster
                index._lay(position, index._ask(first, count))
        made = self._regions[position]
        assert made is not None
        return made

    def _ask(self, first: int, count: int) -> Mask:
        assert self._own is not None
        return self._own.own_pages(first, count)

    def _lay(self, position: int, own: Mask) -> None:
        parent = self._parent
        below = _EMPTY[: len(own)] if parent is None else parent._regions[position]
        assert below is not None
        made = merged(below, own, self.number)
        if self._regions[position] is None:
            self._regions[position] = made
            if made is not below:
                self.own_page_count += int(np.count_nonzero(own))
