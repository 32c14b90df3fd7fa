"""The indexes of small packs as one, in memory: a history of many small snapshots is searched as fast as one pack.

48 bytes per chunk of such packs; a search in an index of its own costs 30 µs however little is in it.
"""

from collections.abc import Mapping

import numpy as np

from forkypig.chunks.format import HASH_BYTES, Hashes, References
from forkypig.chunks.pack_index import ABSENT, PackIndex, find_in

SMALL_CHUNKS = 8192  # a pack with at most so many is small: 32 MiB of changed memory


class SmallPacks:
    """The chunks of several packs."""

    def __init__(self, indexes: Mapping[int, PackIndex]) -> None:
        """`indexes` by the packs' numbers."""
        hashes = [np.empty((0, HASH_BYTES), np.uint8), *(index.hashes for index in indexes.values())]
        together = PackIndex.build(np.concatenate(hashes), np.zeros(0, np.uint64), np.zeros(0, np.uint32))
        self._keys, self._order, self._hashes = together.keys, together.order, together.hashes
        parts = [np.arange(len(index), dtype=np.uint64) | np.uint64(number << 32) for number, index in indexes.items()]
        self._references = np.concatenate([np.zeros(0, np.uint64), *parts])

    def add(self, indexes: Mapping[int, PackIndex]) -> None:
        """More packs: a merge, which takes much less than to begin anew."""
        if not indexes:
            return
        more = SmallPacks(indexes)
        order = np.concatenate([self._order, more._order + np.uint32(len(self._hashes))])
        keys = np.concatenate([self._keys, more._keys])
        by_key = np.argsort(keys, kind="stable")  # two sorted runs
        self._keys, self._order = keys[by_key], order[by_key]
        self._hashes = np.concatenate([self._hashes, more._hashes])
        self._references = np.concatenate([self._references, more._references])

    def find(self, hashes: Hashes) -> References:
        """The reference to each hash, 0 for what is not in these packs."""
        positions = find_in(self._keys, self._order, self._hashes, hashes)
        found = np.zeros(len(hashes), np.uint64)
        here = positions != ABSENT
        found[here] = self._references[positions[here]]
        return found
