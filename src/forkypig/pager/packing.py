"""Packing one snapshot, from the holder's side: a process of its own does it (packer.py), so that neither its CPU time
nor Python's global lock makes a fault wait. Here it gets its job, is followed, and its failure is told."""

import asyncio
import mmap
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forkypig.errors import NotPossibleNow, ResourceExhausted
from forkypig.pager.index import References
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.order import PackOrder
from forkypig.pager.pack_job import Job, Source
from forkypig.pager.packer_link import PackerLink
from forkypig.pager.shelf import Shelf
from forkypig.pager.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Packed:
    """What a packing has made. `memory` has the reference of each page."""

    memory: References
    disk_bytes: int
    devices_bytes: int
    base: Path | None


class Packing:
    """One packing, which several callers may follow."""

    def __init__(self, snapshot: Snapshot, order: PackOrder) -> None:
        self.done_bytes = 0
        self.total_bytes = snapshot.own_bytes
        self.task: asyncio.Task[None] | None = None  # None: there is nothing to do
        self._snapshot, self._order = snapshot, order
        self._news = asyncio.Event()

    async def follow(self) -> AsyncIterator[tuple[int, int]]:
        """Bytes done and bytes in all, whenever they change; ends with the operation, raising its error."""
        if self.task is None:
            self.done_bytes = self.total_bytes
        while self.task is not None and not self.task.done():
            yield self.done_bytes, self.total_bytes
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news, self.task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            self._news.clear()
        if self.task is not None:
            if self.task.cancelled():
                raise NotPossibleNow(f"{self._snapshot.id} was not packed: it is being forgotten")
            self.task.result()
        yield self.done_bytes, self.total_bytes

    async def run(self, shelf: Shelf, layers: FrozenLayers, packer: PackerLink) -> Packed:
        """Packs; when it returns the snapshot is durable. The index is complete, and its layers stay until then. Raises
        ResourceExhausted, NotPossibleNow or DeadlineExceeded; then the snapshot is as it was."""
        index = self._snapshot.memory.index
        sources: dict[int, Source] = {}
        for number in self._snapshot.names:
            memory = layers[number].memory
            if memory is None:
                raise NotPossibleNow(
                    f"{self._snapshot.id} can't be packed: it needs {layers[number].snapshot}, which is lost"
                )
            sources[number] = Source(*memory.file())
        regions = index.snapshot_of_regions()
        references = os.memfd_create("references", os.MFD_CLOEXEC)
        try:
            await asyncio.to_thread(_write, references, regions)
            job = Job(
                snapshot=self._snapshot.id,
                parent=self._snapshot.parent_id,
                memory_bytes=self._snapshot.size_bytes,
                references=references,
                sources=sources,
                order=self._order,
            )
            said = await packer.do(job, self._tell)
            self._check(said, shelf)
            packed = await asyncio.to_thread(_read, references, index.pages)
        finally:
            os.close(references)
        disk = self._order.disk
        return Packed(packed, said["disk_bytes"], said["devices_bytes"], disk.base.path if disk else None)

    def _tell(self, said: dict[str, Any]) -> None:
        self.done_bytes, self.total_bytes = said["done"], said["total"]
        self._news.set()

    def _check(self, said: dict[str, Any], shelf: Shelf) -> None:
        """Raises what the packer says went wrong."""
        if said.get("full"):
            raise ResourceExhausted(
                f"{self._snapshot.id} can't be packed: {said['full']} ({shelf.free_bytes() >> 20} MiB are free); "
                "free some and pack it again (until then it stays in memory)"
            )
        if said.get("error"):
            raise NotPossibleNow(f"{self._snapshot.id} can't be packed: {said['error']}")
        self._tell(said)


def _write(fd: int, regions: list[References]) -> None:
    """In one go per region: the whole may be long, and concatenating it would need it twice."""
    for region in regions:
        os.write(fd, region.tobytes())


def _read(fd: int, pages: int) -> References:
    with mmap.mmap(fd, pages * 8, prot=mmap.PROT_READ) as mapped:
        return np.frombuffer(mapped[:], "<u8").astype(np.uint64)
