"""What a machine's disk consists of: its overlay, those of snapshots that are not packed, and a raw file below them.

This follows from the records alone. The headers of the overlays name what they stood on when they were made; they are
not read, since a packed snapshot's disk is a raw file that a guest has filled, and could be taken for a qcow2 one.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from forkypig.daemon.home import HomePaths
from forkypig.errors import NotPossibleNow
from forkypig.hostd.records import SnapshotRecord
from forkypig.images.store import ImageFiles, ImageStore
from forkypig.model import ImageId, SnapshotId

Chain = Sequence[tuple[Path, str]]  # files with their formats, "qcow2" or "raw"; the top first


class DiskChains:
    """The layers of disks."""

    def __init__(self, home: HomePaths, images: ImageStore, snapshots: Mapping[SnapshotId, SnapshotRecord]) -> None:
        """`snapshots` are those that there are, as they change."""
        self._home, self._images, self._snapshots = home, images, snapshots
        self._image_files: dict[ImageId, ImageFiles] = {}  # reading a manifest takes longer than all else here
        self._opening: Counter[Path] = Counter()

    def below(self, snapshot: SnapshotId | None, image: ImageId) -> Chain:
        """What an overlay stands on that is made on `snapshot` (None: on the image). Raises NotPossibleNow."""
        found: list[tuple[Path, str]] = []
        for record in self.unpacked(snapshot):
            found.append((record.disk, "qcow2"))
            snapshot = record.snapshot.parent
        if snapshot is not None:
            return [*found, (self.packed_disk(snapshot), "raw")]
        files = self._files(image)
        return [*found, (files.disk, files.disk_format)]

    def unpacked(self, snapshot: SnapshotId | None) -> Iterator[SnapshotRecord]:
        """The snapshot and those that it stands on, down to the nearest packed one, which is not among them."""
        while snapshot is not None:
            record = self._snapshots.get(snapshot)
            if record is None:
                raise NotPossibleNow(f"snapshot {snapshot} is gone, and with it a part of the disk that stood on it")
            if record.is_durable:
                return
            yield record
            snapshot = record.snapshot.parent

    def is_packed(self, snapshot: SnapshotId) -> bool:
        """Whether the snapshot is packed now; a record that was looked up before an `await` may not know it yet."""
        record = self._snapshots.get(snapshot)
        return record is not None and record.is_durable

    def packed_disk(self, snapshot: SnapshotId) -> Path:
        """The pager's file with the disk of a packed snapshot."""
        return self._home.memory / snapshot / "disk"

    def packed_devices(self, snapshot: SnapshotId) -> Path:
        """The pager's file with the device state of a packed snapshot."""
        return self._home.memory / snapshot / "devices"

    def image_disk(self, image: ImageId) -> Path:
        """The disk of an image. Raises NotFound, InvalidRequest."""
        return self._files(image).disk

    @contextlib.contextmanager
    def opening(self, chain: Chain) -> Iterator[None]:
        """While a process opens these files they are not removed."""
        paths = [path for path, _ in chain]
        self._opening.update(paths)
        try:
            yield
        finally:
            self._opening.subtract(paths)

    def is_being_opened(self, path: Path) -> bool:
        """Whether a process is about to open the file."""
        return self._opening[path] > 0

    def _files(self, image: ImageId) -> ImageFiles:
        if image not in self._image_files:
            self._image_files[image] = self._images.files(image)
        return self._image_files[image]
