"""Which chunks a snapshot consists of."""

from collections.abc import Sequence

import numpy as np

from forkypig.chunks.format import BASE_HASH, ZERO_HASH, Hashes, as_hashes
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.section import Section, kinds
from forkypig.chunks.store import Store
from forkypig.errors import Damaged

_REGIONS_TOGETHER = 256


def roots(manifest: Manifest) -> Hashes:
    """The hashes that the manifest itself names: pieces of the device state, and blocks; each once."""
    parts = (manifest.devices.hashes(), manifest.memory.block_hashes(), manifest.disk.block_hashes())
    return distinct(np.concatenate(parts))


def pages(store: Store, manifest: Manifest) -> Hashes:
    """The hashes of its pages, each once; the blocks are in the store. Raises Damaged when a block is not, or is none,
    or names pages of a base image where the manifest has none."""
    found = [np.empty((0, 32), np.uint8)]
    for section in (manifest.memory, manifest.disk):
        every_first = range(0, section.regions, _REGIONS_TOGETHER)
        found += [_pages_of(store, section, range(section.regions)[at : at + _REGIONS_TOGETHER]) for at in every_first]
    every = distinct(np.concatenate(found))
    _, base = kinds(every)
    if manifest.base is None and (base.any() or BASE_HASH in _entries(manifest)):
        raise Damaged(f"snapshot {manifest.snapshot} has pages of a base image, but names none")
    return every[~base]


def _pages_of(store: Store, section: Section, regions: Sequence[int]) -> Hashes:
    each = section.page_hashes(store, regions)
    every = np.concatenate(each)
    zero, _ = kinds(every)
    return distinct(every[~zero])


def _entries(manifest: Manifest) -> set[bytes]:
    blocks = (manifest.memory.blocks, manifest.disk.blocks)
    return {part[at : at + 32] for part in blocks for at in range(0, len(part), 32)} - {ZERO_HASH}


def distinct(hashes: Hashes) -> Hashes:
    """Each hash once, sorted."""
    if not len(hashes):
        return hashes.reshape(0, 32)
    rows = np.unique(np.ascontiguousarray(hashes).view("V32").reshape(-1))
    return as_hashes([rows.tobytes()])


def check_complete(store: Store, manifest: Manifest) -> None:
    """Raises Damaged when anything that the snapshot consists of is not in the store. Reads the blocks and the device
    state; that the pages are what their hashes say was verified as they came."""
    manifest.devices.read(store)
    manifest.memory.expand(store)
    manifest.disk.expand(store)
    pages(store, manifest)
