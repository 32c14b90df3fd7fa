"""One file of a snapshot as FUSE serves it: its memory, its disk or its device state."""

from enum import Enum
from pathlib import Path

from forkypig.pager.index import PageIndex


class FileKind(Enum):
    """The files of a snapshot; the value is the file's name, and what a manifest calls it."""

    MEMORY = "memory"
    DISK = "disk"
    DEVICES = "devices"


class ServedFile:
    """A file and its index. `snapshot` is the id of the snapshot that it belongs to."""

    def __init__(self, snapshot: str, kind: FileKind, node: int, size_bytes: int, index: PageIndex) -> None:
        self.snapshot, self.kind, self.node, self.size_bytes = snapshot, kind, node, size_bytes
        self.index = index
        self.base: Path | None = None  # where the image lies to which references may point
        self.opened = 0
        self.touched = False  # opened ever, so that the page cache may hold some of it
        self.reads = self.read_bytes = 0
