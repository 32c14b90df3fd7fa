"""For each 4 KiB page of a file: a reference, which says where its content is. One look-up, whatever the depth.

References are uint64 (forkypig.chunks.format): zero, a frozen layer, the base image, or a place in a pack.

The index of a frozen memory is made region by region when it is first needed, so that a freeze costs nothing whatever
the memory's size: one small read of pagemap, merged over the parent's region by numpy. That of a stored file is filled
by whoever reads the chunk store (stored.py). A region without own pages is the parent's array itself: regions are
immutable, and shared between snapshots.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from forkypig.chunks.format import BASE, FROZEN, PAGE_BYTES, REGION_PAGES

REGION_BYTES = REGION_PAGES * PAGE_BYTES
ZERO = 0  # the reference of a page that reads as zeros

References = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
PageRun = tuple[int, int]  # first page, number of pages
Replaced = dict[int, tuple[References, References]]  # by id: an old region, so that it keeps its id, and the new


class NotMade(Exception):
    """A region has still to be read from the chunk store."""

    def __init__(self, index: "PageIndex", position: int) -> None:
        self.index, self.position = index, position
        super().__init__(position)


def _immutable(references: References) -> References:
    references.flags.writeable = False  # regions are shared between snapshots
    return references


_EMPTY: References = _immutable(np.zeros(REGION_PAGES, np.uint64))
_ALL_BASE: References = _immutable(np.full(REGION_PAGES, BASE, np.uint64))


class OwnPages(Protocol):
    """Tells which pages a layer holds."""

    def own_pages(self, first: int, count: int) -> Mask:
        """For `count` pages from `first`, whether they are its own. Raises OSError when it can't be told."""


def frozen_reference(number: int) -> int:
    """The reference of the pages that frozen layer `number` holds."""
    return FROZEN | number


def merged(below: References, own: Mask, reference: int) -> References:
    """A layer with the pages `own` laid over `below`; `below` itself if it has none."""
    if not own.any():
        return below
    return _immutable(np.where(own, np.uint64(reference), below))


class PageIndex:
    """The index of one file."""

    def __init__(self, size_bytes: int, number: int, parent: "PageIndex | None", own: OwnPages | None) -> None:
        """`number` is of the frozen layer that `own` tells of; without `own` the regions are all given (`fill`)."""
        self.pages = -(-size_bytes // PAGE_BYTES)
        self.own_page_count = 0  # as far as the index is made
        self.stored_as: tuple[str, str] | None = None  # snapshot and file, where the store has it
        self.complete = self.pages == 0
        self._reference = frozen_reference(number)
        self._parent = parent
        self._own = own
        self._regions: list[References | None] = [None] * -(-self.pages // REGION_PAGES)

    @property
    def regions(self) -> int:
        """How many regions there are."""
        return len(self._regions)

    def is_made(self, position: int) -> bool:
        """Whether a region is there."""
        return self._regions[position] is not None

    def references(self, first: int, count: int) -> list[int]:
        """The references of `count` pages from `first`. Raises OSError when a frozen process can't be asked, NotMade
        when the store has to be."""
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

    # -- a stored file -------------------------------------------------------------------------------------------

    def fill(self, position: int, references: References) -> None:
        """Sets the regions from `position` on, from the reference of each page."""
        for at in range(0, len(references), REGION_PAGES):
            region = references[at : at + REGION_PAGES]
            if not region.any():
                region = _EMPTY[: len(region)]
            elif (region == _ALL_BASE[0]).all():
                region = _ALL_BASE[: len(region)]
            else:
                region = _immutable(region.copy())
            self._regions[position + at // REGION_PAGES] = region
        self.complete = all(region is not None for region in self._regions)

    def drop(self) -> None:
        """Forgets the regions of a stored file: they can be read again."""
        self._regions = [None] * len(self._regions)
        self.complete = self.pages == 0

    # -- a frozen memory -----------------------------------------------------------------------------------------

    def complete_step(self, position: int, count: int) -> None:
        """Makes up to `count` regions from `position` with one question to the process. The parent is complete."""
        end = min(position + count, len(self._regions))
        if all(region is not None for region in self._regions[position:end]):
            return
        assert self._own is not None
        first = position * REGION_PAGES
        own = self._own.own_pages(first, min(end * REGION_PAGES, self.pages) - first)
        for at in range(position, end):
            if self._regions[at] is None:
                self._lay(at, own[(at - position) * REGION_PAGES : (at - position + 1) * REGION_PAGES])

    def all_made(self) -> None:
        """Every region is made: the index needs neither its parent nor the process any more."""
        assert all(region is not None for region in self._regions)
        self.complete = True
        self._parent = self._own = None
        counts = {id(region): np.count_nonzero(region == np.uint64(self._reference)) for region in self._distinct()}
        self.own_page_count = int(sum(counts[id(region)] for region in self._regions))

    def layers(self) -> set[int]:
        """The numbers of all frozen layers that the (complete) index names."""
        numbers: set[int] = set()
        for region in self._distinct():
            frozen = region[region >= np.uint64(FROZEN)]
            if len(frozen):
                numbers.update((np.unique(frozen) ^ np.uint64(FROZEN)).tolist())
        return numbers

    def snapshot_of_regions(self) -> list[References]:
        """The regions of the complete index as they are now: immutable, for another thread."""
        regions = [region for region in self._regions if region is not None]
        assert len(regions) == len(self._regions)
        return regions

    def fill_packed(self, packed: References, done: Replaced) -> Iterator[None]:
        """Names only what `packed` says of each page. A generator, a step a region: machines fault meanwhile, and the
        old answers are as right as the new. `done` keeps old regions with the new ones, for those who share them."""
        for position, region in enumerate(self._regions):
            assert region is not None
            new = packed[position * REGION_PAGES : position * REGION_PAGES + len(region)]
            if np.array_equal(new, region):
                new = region
            else:
                new = _EMPTY[: len(region)] if not new.any() else _immutable(new.copy())
            done[id(region)] = region, new
            self._regions[position] = new
            yield

    def replaced(self, number: int, packed: References, done: Replaced) -> Iterator[None]:
        """Replaces what frozen layer `number` held by what `packed` (a reference for each page) says; otherwise as
        `fill_packed`."""
        old = np.uint64(frozen_reference(number))
        for position, region in enumerate(self._regions):
            if region is None:
                continue
            if id(region) not in done:
                held = region == old
                new = region
                if held.any():
                    first = position * REGION_PAGES
                    new = _immutable(np.where(held, packed[first : first + len(region)], region))
                done[id(region)] = region, new
            self._regions[position] = done[id(region)][1]
            yield

    def moved(self, renamed: Callable[[References], References], done: Replaced) -> Iterator[None]:
        """Replaces references by what `renamed` says; otherwise as `fill_packed`."""
        for position, region in enumerate(self._regions):
            if region is None:
                continue
            if id(region) not in done:
                new = renamed(region)
                done[id(region)] = region, region if np.array_equal(new, region) else _immutable(new)
            self._regions[position] = done[id(region)][1]
            yield

    def _distinct(self) -> list[References]:
        return list({id(region): region for region in self._regions if region is not None}.values())

    def _make(self, position: int) -> References:
        """Makes one region, and that of each ancestor that lacks it (a loop: chains may be thousands deep)."""
        chain: list[PageIndex] = [self]
        while (parent := chain[-1]._parent) is not None and parent._regions[position] is None:
            chain.append(parent)
        if chain[-1]._own is None:
            raise NotMade(chain[-1], position)
        first = position * REGION_PAGES
        count = min(REGION_PAGES, self.pages - first)
        for index in reversed(chain):
            assert index._own is not None
            index._lay(position, index._own.own_pages(first, count))
        made = self._regions[position]
        assert made is not None
        return made

    def _lay(self, position: int, own: Mask) -> None:
        parent = self._parent
        below = _EMPTY[: len(own)] if parent is None else parent._regions[position]
        assert below is not None
        made = merged(below, own, self._reference)
        self._regions[position] = made
        if made is not below:
            self.own_page_count += int(np.count_nonzero(own))
