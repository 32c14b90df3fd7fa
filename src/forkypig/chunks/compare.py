"""What two snapshots' memories or disks do not have in common. Blocks that are the same are not looked into."""

import numpy as np

from forkypig.chunks.format import HASH_BYTES, REGION_PAGES
from forkypig.chunks.section import Section
from forkypig.chunks.store import Store
from forkypig.errors import InvalidRequest

Run = tuple[int, int]  # first page, number of pages
_REGIONS_AT_ONCE = 256


def differing(store: Store, before: Section, after: Section) -> list[Run]:
    """The runs of pages whose content differs. Raises InvalidRequest for sections of two sizes, Damaged."""
    if before.size_bytes != after.size_bytes:
        raise InvalidRequest(f"{before.size_bytes >> 20} and {after.size_bytes >> 20} MiB can't be compared")
    blocks = [np.frombuffer(section.blocks, np.uint8).reshape(-1, HASH_BYTES) for section in (before, after)]
    regions = np.flatnonzero((blocks[0] != blocks[1]).any(axis=1)).tolist()
    pages: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for at in range(0, len(regions), _REGIONS_AT_ONCE):
        some = regions[at : at + _REGIONS_AT_ONCE]
        each = zip(some, before.page_hashes(store, some), after.page_hashes(store, some), strict=True)
        pages += [np.flatnonzero((old != new).any(axis=1)) + region * REGION_PAGES for region, old, new in each]
    return _runs(np.concatenate(pages)) if pages else []


def _runs(pages: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[Run]:
    """Page numbers, growing, as runs."""
    if not len(pages):
        return []
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    counts = np.diff(starts, append=len(pages))
    return list(zip(pages[starts].tolist(), counts.tolist(), strict=True))
