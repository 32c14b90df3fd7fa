"""A memory or a disk of a snapshot as blocks: for each 2 MiB region the hash of the block that has the hashes of its
pages.

Blocks are chunks of the store themselves, so what two snapshots have in common is stored once, and a snapshot's list
of regions is short.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forkypig.chunks.format import (
    BASE,
    BASE_HASH,
    HASH_BYTES,
    PAGE_BYTES,
    REGION_PAGES,
    ZERO_HASH,
    Hashes,
    Mask,
    References,
    as_hashes,
    check_size,
    is_base,
    is_frozen,
    is_packed,
)
from forkypig.chunks.store import Store
from forkypig.chunks.writer import Writer
from forkypig.errors import Damaged

_BASE_ROW = np.frombuffer(BASE_HASH, np.uint8)


@dataclass(frozen=True, slots=True)
class Section:
    """What a memory or a disk consists of. `blocks` has an entry of 32 bytes for each region: the hash of its block, or
    ZERO_HASH or BASE_HASH for a region that is all zeros or all base image."""

    size_bytes: int
    blocks: bytes = b""

    def __post_init__(self) -> None:
        """Raises Damaged when the two don't fit each other."""
        check_size(self.size_bytes, "a section")
        if len(self.blocks) != self.regions * HASH_BYTES:
            raise Damaged(f"a section of {self.size_bytes} bytes has {len(self.blocks) / HASH_BYTES:g} blocks")

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return self.size_bytes // PAGE_BYTES

    @property
    def regions(self) -> int:
        """How many regions it has; the last may have fewer pages."""
        return -(-self.pages // REGION_PAGES)

    def block_hashes(self) -> Hashes:
        """The distinct hashes of its blocks."""
        return as_hashes(sorted(set(self._entries()) - {ZERO_HASH, BASE_HASH}))

    def page_hashes(self, store: Store, regions: Sequence[int]) -> list[Hashes]:
        """For each of these regions the entries of its pages: hashes, zeros, or the base's. Raises Damaged."""
        entries = self._entries()
        wanted = [entries[region] for region in regions]
        stored = sorted(set(wanted) - {ZERO_HASH, BASE_HASH})
        contents = dict(zip(stored, read_hashes(store, as_hashes(stored)), strict=True))
        found: list[Hashes] = []
        for region, entry in zip(regions, wanted, strict=True):
            pages = min(REGION_PAGES, self.pages - region * REGION_PAGES)
            content = contents.get(entry)
            if content is None:
                found.append(np.broadcast_to(np.frombuffer(entry, np.uint8), (pages, HASH_BYTES)))
            elif len(content) != pages * HASH_BYTES:
                raise Damaged(f"block {entry.hex()} of region {region} has {len(content)} bytes, not one hash per page")
            else:
                found.append(np.frombuffer(content, np.uint8).reshape(pages, HASH_BYTES))
        return found

    def expand_regions(self, store: Store, regions: Sequence[int]) -> list[References]:
        """For each of these regions the references of its pages. Raises Damaged when a chunk is missing or is no
        page."""
        each = self.page_hashes(store, regions)
        if not each:
            return []
        together = np.concatenate(each)
        references = resolve(store, together)
        return np.split(references, np.cumsum([len(one) for one in each])[:-1])

    def expand(self, store: Store) -> References:
        """The reference of every page. Raises Damaged when a chunk is missing or is no page."""
        zero, base = kinds(np.frombuffer(self.blocks, np.uint8).reshape(-1, HASH_BYTES))
        rows = np.zeros((self.regions, REGION_PAGES), np.uint64)
        rows[base] = BASE
        references = rows.reshape(-1)[: self.pages]
        stored = np.flatnonzero(~zero & ~base).tolist()
        for region, part in zip(stored, self.expand_regions(store, stored), strict=True):
            references[region * REGION_PAGES :][: len(part)] = part
        return references

    def _entries(self) -> list[bytes]:
        return [self.blocks[at : at + HASH_BYTES] for at in range(0, len(self.blocks), HASH_BYTES)]


def kinds(entries: Hashes) -> tuple[Mask, Mask]:
    """Which of the entries of blocks are zeros, and which are the base's."""
    return np.logical_not(entries.any(axis=1)), np.asarray((entries == _BASE_ROW).all(axis=1))


def resolve(store: Store, entries: Hashes) -> References:
    """The references of entries of blocks. Raises Damaged."""
    zero, base = kinds(entries)
    references = np.where(base, np.uint64(BASE), np.uint64(0))
    packed = np.flatnonzero(~zero & ~base)
    found = store.find(entries[packed])
    missing = np.flatnonzero(found == 0)
    if len(missing):
        first = entries[packed[missing[0]]].tobytes().hex()
        raise Damaged(f"{len(missing)} chunks are not in the store, {first} is the first: see `forky fsck`")
    if (store.lengths(found) != PAGE_BYTES).any():
        raise Damaged("a block names a chunk that is no page")
    references[packed] = found
    return references


def read_hashes(store: Store, hashes: Hashes) -> list[bytes]:
    """The contents with these hashes. Raises Damaged when one is missing."""
    references = store.find(hashes)
    missing = np.flatnonzero(references == 0)
    if len(missing):
        raise Damaged(f"chunk {hashes[missing[0]].tobytes().hex()} is not in the store: see `forky fsck`")
    return store.read(references.tolist())


def make_section(writer: Writer, references: References, size_bytes: int) -> Section:
    """The section of these pages, none of which is in a frozen process. Its blocks are added to the store, but for
    those that it has: what did not change since the parent costs nothing. Raises ResourceExhausted."""
    check_size(size_bytes, "a section")
    assert len(references) == size_bytes // PAGE_BYTES
    assert not is_frozen(references).any()
    starts = np.arange(0, len(references), REGION_PAGES)
    if not len(starts):
        return Section(0)
    lowest, highest = np.minimum.reduceat(references, starts), np.maximum.reduceat(references, starts)
    entries = np.zeros((len(starts), HASH_BYTES), np.uint8)  # of regions that are all zeros
    entries[(lowest == BASE) & (highest == BASE)] = _BASE_ROW
    mixed = np.flatnonzero((lowest != highest) | is_packed(highest))
    contents = [_block(writer, references[region * REGION_PAGES :][:REGION_PAGES]) for region in mixed.tolist()]
    entries[mixed] = writer.hashes(writer.add_contents(contents))
    return Section(size_bytes, entries.tobytes())


def _block(writer: Writer, references: References) -> bytes:
    """What stands in the block of a region."""
    entries = np.zeros((len(references), HASH_BYTES), np.uint8)
    packed = is_packed(references)
    entries[packed] = writer.hashes(references[packed])
    entries[is_base(references)] = _BASE_ROW
    return entries.tobytes()
