"""Adds pages and other contents to a store: zeros and what the store has cost a look, the rest becomes a new pack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forkypig.chunks import coding
from forkypig.chunks.format import (
    HASH_BYTES,
    MAX_CONTENT_BYTES,
    PAGE_BYTES,
    Buffer,
    Hashes,
    References,
    as_hashes,
    as_pages,
    pack_path,
    packs_of,
    positions_of,
)
from forkypig.chunks.pack_index import ABSENT
from forkypig.chunks.pack_writer import PackWriter

if TYPE_CHECKING:
    from forkypig.chunks.store import Store

BATCH_PAGES = 1024  # a Python dict of a batch's hashes is small; 4 MiB keep a compressor busy for 10 ms


class Writer:
    """What is added in one go. Made by `Store.writer`, which holds the lock meanwhile. Belongs to one thread."""

    def __init__(self, store: "Store", number: int) -> None:
        """Use `Store.writer`."""
        self.number = number  # of the pack that is written; not there when nothing was new
        self.pages = 0  # that were added, zeros and duplicates among them
        self.zero_pages = 0
        self._store = store
        self._pack: PackWriter | None = None
        self._committed = False

    @property
    def new_chunks(self) -> int:
        """How many chunks were not in the store yet."""
        return len(self._pack) if self._pack else 0

    @property
    def stored_bytes(self) -> int:
        """How long the new pack is, as far as it is written."""
        return self._pack.stored_bytes if self._pack else 0

    def add(self, pages: Buffer) -> References:
        """The references to pages, given as one buffer of whole pages, which may change afterwards. They are valid
        for others after `commit`. Raises ResourceExhausted on a full disk, Damaged when a pack that must be looked
        into is."""
        array = as_pages(pages)
        found = np.zeros(len(array), np.uint64)
        for first in range(0, len(array), BATCH_PAGES):
            batch = array[first : first + BATCH_PAGES]
            used = np.flatnonzero(batch.any(axis=1))
            self.pages += len(batch)
            self.zero_pages += len(batch) - len(used)
            if len(used):
                content = batch[used].data.cast("B")
                hashes = coding.hash_each(content, PAGE_BYTES, self._store.address_key)
                found[first + used] = self._placed(hashes, content, np.full(len(used), PAGE_BYTES, np.int64))
        return found

    def add_contents(self, contents: Sequence[bytes]) -> References:
        """The references to other contents, of 1 to 65536 bytes each."""
        if not contents:
            return np.zeros(0, np.uint64)
        assert all(0 < len(content) <= MAX_CONTENT_BYTES for content in contents)
        hashes = [coding.address(content, self._store.address_key) for content in contents]
        lengths = np.array([len(content) for content in contents], np.int64)
        return self._placed(hashes, memoryview(b"".join(contents)), lengths)

    def add_stored(self, hashes: Hashes, pieces: list[bytes], sizes: npt.NDArray[np.uint32]) -> References:
        """Adds chunks as another pack of this store has them; for `collect`, which reads them by `PackFile.opened`."""
        pack = self._writing()
        first = pack.add_stored(hashes, pieces, sizes)
        return np.arange(first, first + len(hashes), dtype=np.uint64) | np.uint64(self.number << 32)

    def find(self, hashes: Hashes) -> References:
        """As `Store.find`, but what was added here is found too."""
        found = self._store.find(hashes)
        left = np.flatnonzero(found == 0)
        if self._pack is not None and len(left):
            found[left] = self._own(self._pack.written.find(hashes[left]))
        return found

    def hashes(self, references: References) -> Hashes:
        """As `Store.hashes`, but of what was added here too."""
        here = packs_of(references) == self.number
        if self._committed or not here.any():
            return self._store.hashes(references)
        assert self._pack is not None
        found = np.empty((len(references), HASH_BYTES), np.uint8)
        found[here] = self._pack.written.hashes()[positions_of(references[here])]
        found[~here] = self._store.hashes(references[~here])
        return found

    def commit(self) -> None:
        """All that was added is durable. Raises ResourceExhausted on a full disk; then nothing of it stays."""
        assert not self._committed
        if self._pack is not None:
            self._pack.finish()
        self._committed = True
        self._store.refresh()

    def close(self) -> None:
        """Without `commit` nothing stays."""
        if self._pack is not None:
            self._pack.abandon()

    def _placed(self, hashes: list[bytes], content: memoryview, lengths: npt.NDArray[np.int64]) -> References:
        """The references of contents, of which those that nobody has yet are added."""
        distinct = list(dict.fromkeys(hashes))
        number_of = dict(zip(distinct, range(len(distinct)), strict=True))
        member = np.fromiter(map(number_of.__getitem__, hashes), np.int64, len(hashes))
        wanted = as_hashes(distinct)
        found = self.find(wanted)
        new = found == 0
        if new.any():
            fresh = np.flatnonzero(new)
            firsts = np.unique(member, return_index=True)[1][fresh]
            part, part_lengths = _parts(content, lengths, firsts)
            first = self._writing().add(wanted[fresh], part, part_lengths)
            found[fresh] = self._own(np.arange(first, first + len(fresh)))
        return found[member]

    def _own(self, positions: npt.NDArray[np.int64]) -> References:
        references = positions.astype(np.uint64) | np.uint64(self.number << 32)
        return np.where(positions == ABSENT, np.uint64(0), references)

    def _writing(self) -> PackWriter:
        assert not self._committed
        if self._pack is None:
            self._pack = PackWriter(pack_path(self._store.directory, self.number), self._store.key)
        return self._pack


def _parts(
    content: memoryview, lengths: npt.NDArray[np.int64], which: npt.NDArray[np.int64]
) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """The contents of these numbers, one after the other."""
    if len(which) == len(lengths):
        return content, lengths
    if (lengths == lengths[0]).all():
        rows = np.frombuffer(content, np.uint8).reshape(len(lengths), -1)
        return rows[which].data.cast("B"), lengths[which]
    ends = np.cumsum(lengths)
    pieces = [content[int(ends[n] - lengths[n]) : int(ends[n])] for n in which.tolist()]
    return memoryview(b"".join(pieces)), lengths[which]
