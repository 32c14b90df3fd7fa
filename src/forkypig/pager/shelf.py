"""Packed snapshots as they lie in the chunk store: which there are, and the working sets of their starts.

store/manifests/<id>.manifest     what makes a snapshot packed (forkypig.chunks)
store/touched/<id>                JSON: the pages that its last start touched, as [first, count]; a hint, not synced
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from forkypig.chunks import manifest_file
from forkypig.chunks.store import open_store
from forkypig.errors import ForkyError
from forkypig.model import SnapshotId
from forkypig.pager.index import PageRun

log = structlog.get_logger()

_LONGEST_HINT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """What there is to offer of a packed snapshot."""

    snapshot: SnapshotId
    parent: str
    memory_bytes: int
    disk_bytes: int
    devices_bytes: int
    base: Path | None  # where its base image's disk should be


class Shelf:
    """The directory of the store, for the holder: it reads manifests and no chunk."""

    def __init__(self, directory: Path, images: Path) -> None:
        """`images` is where base images lie, each in a directory named for its id."""
        self.directory = directory
        self._store = open_store(directory)
        self._images = images
        self._touched = directory / "touched"
        self._touched.mkdir(mode=0o700, exist_ok=True)

    def free_bytes(self) -> int:
        """What the disk has left for us."""
        disk = os.statvfs(self.directory)
        return disk.f_bavail * disk.f_frsize

    def load(self) -> list[StoredSnapshot]:
        """All packed snapshots. One whose manifest is damaged is logged and left to `forky fsck`."""
        found = []
        for snapshot in manifest_file.saved(self._store):
            try:
                found.append(self.stored(snapshot))
            except (ForkyError, OSError) as error:
                log.error("packed snapshot can't be offered", snapshot=snapshot, error=str(error))
        return found

    def stored(self, snapshot: SnapshotId) -> StoredSnapshot:
        """What a manifest says. Raises NotFound, Damaged."""
        manifest = manifest_file.load(self._store, snapshot)
        return StoredSnapshot(
            snapshot=snapshot,
            parent=manifest.parent or "",
            memory_bytes=manifest.memory.size_bytes,
            disk_bytes=manifest.disk.size_bytes,
            devices_bytes=manifest.devices.length,
            base=self._images / manifest.base.id / "disk.raw" if manifest.base else None,
        )

    def remove(self, snapshot: SnapshotId) -> None:
        """The snapshot is no more. Blocks on the disk. Fine when it was never packed."""
        if manifest_file.manifest_path(self._store, snapshot).exists():
            manifest_file.remove(self._store, snapshot)
        (self._touched / snapshot).unlink(missing_ok=True)

    def touched(self, snapshot: SnapshotId) -> tuple[PageRun, ...]:
        """The pages that the last start from a snapshot touched, as far as is known."""
        try:
            with (self._touched / snapshot).open("rb") as file:
                runs = json.loads(file.read(_LONGEST_HINT_BYTES))
            return tuple((int(first), int(count)) for first, count in runs if first >= 0 < count)
        except (OSError, ValueError, TypeError):
            return ()

    def save_touched(self, snapshot: SnapshotId, runs: Iterable[PageRun]) -> None:
        """Keeps them for the next start. A disk that is full costs that start its speed, nothing more."""
        path = self._touched / snapshot
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(list(runs)))
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            log.warning("working set not kept", snapshot=snapshot, error=str(error))
