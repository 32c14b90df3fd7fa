"""The shelf: settled snapshots as files in HOME/layers, written and found again.

    <id>.layer         own pages, sparse        <id>.layer.part    one that is being written
    <id>.index         what makes it settled    <id>.index.part    likewise

Order of writing: the layer is synced and renamed, then the index is. A layer that no index names is rubbish, whatever
the reason, and goes at the next start.
"""

import asyncio
import os
from pathlib import Path

import structlog

from forkypig.model.ids import is_id
from forkypig.pager import index_file
from forkypig.pager.index import PageIndex
from forkypig.pager.index_file import Damaged, SavedIndex
from forkypig.pager.layers import LayerFile, LayerTable
from forkypig.pager.prefetch import Recording
from forkypig.pager.snapshot import Snapshot, State

log = structlog.get_logger()


class Shelf:
    """The directory of layers and indexes."""

    def __init__(self, directory: Path, layers: LayerTable) -> None:
        self.directory = directory
        self._layers = layers

    def part(self, snapshot_id: str) -> Path:
        """Where a layer is written until it is whole."""
        return self.directory / f"{snapshot_id}.layer.part"

    def free_bytes(self) -> int:
        """What the disk has left for us."""
        disk = os.statvfs(self.directory)
        return disk.f_bavail * disk.f_frsize

    def unlink_index(self, snapshot_id: str) -> None:
        (self.directory / f"{snapshot_id}.index").unlink(missing_ok=True)

    async def save(self, snapshot: Snapshot) -> LayerFile:
        """Puts the written (and synced) part in place, and the index that goes with it. Returns the layer's file.
        Raises OSError when the disk is full; then nothing is left of it."""
        numbers = sorted(snapshot.names)
        names = tuple(self._layers[number].snapshot for number in numbers)
        local = {number: position for position, number in enumerate(numbers, 1)}
        touched = snapshot.recording.runs

        def write() -> LayerFile:
            owners = index_file.renumbered(snapshot.index.as_array(), local)
            saved = SavedIndex(snapshot.id, snapshot.parent_id, snapshot.size_bytes, names, owners, touched)
            path = self._layers.path(snapshot.id)
            self.part(snapshot.id).rename(path)
            try:
                index_file.sync_directory(self.directory)
                index_file.write(self.directory / f"{snapshot.id}.index", saved)
                return LayerFile(path)
            except OSError:
                path.unlink(missing_ok=True)
                raise

        # Shielded: once begun it is done or not done, whoever loses interest.
        return await asyncio.shield(asyncio.to_thread(write))

    def load(self) -> list[Snapshot]:
        """All settled snapshots on the shelf; removes what belongs to none. One that is damaged is logged and left."""
        for part in self.directory.glob("*.part"):
            part.unlink()
        saved: dict[str, SavedIndex] = {}
        for path in sorted(self.directory.glob("*.index")):
            try:
                index = index_file.decode(path.read_bytes())
            except (Damaged, ValueError, KeyError) as error:
                log.error("index file is damaged", path=str(path), error=str(error))
                continue
            if is_id(index.snapshot) and path.stem == index.snapshot:
                saved[index.snapshot] = index
        loaded: dict[str, Snapshot] = {}
        for index in _parents_first(saved):
            loaded[index.snapshot] = self._take(index, loaded.get(index.parent))
        damaged = any(path.stem not in saved for path in self.directory.glob("*.index"))
        for path in self.directory.glob("*.layer"):
            if self._layers.of(path.stem) is None and not damaged:
                log.info("layer that no index names removed", path=str(path))
                path.unlink()
        return list(loaded.values())

    def _take(self, saved: SavedIndex, parent: Snapshot | None) -> Snapshot:
        snapshot = Snapshot(saved.snapshot, saved.size_bytes, None, saved.parent)
        numbers: dict[int, int] = {}
        whole = True
        for position, name in enumerate(saved.layers, 1):
            layer = self._layers.of(name)
            if layer is None:
                path = self._layers.path(name)
                layer = self._layers.add(name, LayerFile(path) if path.exists() else None)
            whole = whole and layer.source is not None
            numbers[position] = layer.number
            if name == saved.snapshot:
                snapshot.layer = layer
        owners = index_file.renumbered(saved.owners, numbers)
        snapshot.index = PageIndex.from_owners(owners, snapshot.layer.number, parent.index if parent else None)
        snapshot.names = set(numbers.values())
        snapshot.recording = Recording.of(saved.touched)
        self._layers.use(snapshot.names, snapshot.id)
        snapshot.enter(State.SETTLED if whole else State.LOST)
        return snapshot


def _parents_first(saved: dict[str, SavedIndex]) -> list[SavedIndex]:
    """So that each can share regions with its parent."""
    ordered: dict[str, SavedIndex] = {}
    for index in saved.values():
        chain = []
        at: SavedIndex | None = index
        while at is not None and at.snapshot not in ordered and at not in chain:
            chain.append(at)
            at = saved.get(at.parent)
        ordered.update((link.snapshot, link) for link in reversed(chain))
    return list(ordered.values())
