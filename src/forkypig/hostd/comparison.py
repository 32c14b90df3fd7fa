"""Which pages of memory two snapshots do not have in common: told from their manifests, without reading a page."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from forkypig.chunks import manifest_file
from forkypig.chunks.compare import differing
from forkypig.chunks.format import PAGE_BYTES
from forkypig.chunks.store import open_store
from forkypig.hostd.packing import pack
from forkypig.model import MemoryDiff, Progress, SnapshotId

if TYPE_CHECKING:
    from forkypig.hostd.host import Host


async def memory_diff(host: "Host", before: SnapshotId, after: SnapshotId) -> AsyncIterator[Progress | MemoryDiff]:
    """Packs what is not packed yet; then the result. Raises NotFound, InvalidRequest (two sizes), Damaged."""
    for snapshot in (before, after):
        host.snapshot(snapshot)
        async for progress in pack(host, snapshot):
            yield progress
    yield await asyncio.to_thread(_compared, host, before, after)


def _compared(host: "Host", before: SnapshotId, after: SnapshotId) -> MemoryDiff:
    store = open_store(host.settings.store)
    old, new = (manifest_file.load(store, snapshot).memory for snapshot in (before, after))
    runs = differing(store, old, new)
    ranges = tuple((first * PAGE_BYTES, count * PAGE_BYTES) for first, count in runs)
    return MemoryDiff(sum(count for _, count in runs), old.pages, ranges)
