"""The file system: /<snapshot id>/memory, disk and devices, read-only in content, cached by the kernel for ever.

What is bound never changes, so the kernel's page cache is never dropped: all children of a snapshot share it. The mode
bits allow writing and opening O_RDWR works, because QEMU's memory-backend-file opens so even for a private mapping
(`readonly` came later); writing itself is refused.

A node's number follows from the snapshot's id (snapshot.py), so that a process that goes on with the connection of
another means the same by it.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable

import structlog

from forkypig.pager.catalogue import Catalogue
from forkypig.pager.content import Content
from forkypig.pager.fuse import ROOT, Attributes
from forkypig.pager.served import FileKind, ServedFile
from forkypig.pager.snapshot import NODES, Snapshot

log = structlog.get_logger()


class FileSystem:
    """fuse.Operations on a Catalogue."""

    def __init__(self, catalogue: Catalogue, content: Content) -> None:
        self._catalogue, self._content = catalogue, content

    def attributes(self, node: int) -> Attributes:
        if node == ROOT or node % NODES == 0:
            if node != ROOT:
                self._snapshot(node)
            return Attributes(node, stat.S_IFDIR | 0o700, 0)
        return Attributes(node, stat.S_IFREG | 0o600, self._file(node).size_bytes)

    def lookup(self, directory: int, name: str) -> Attributes:
        for entry, node in self.entries(directory) if directory != ROOT else self._named(name):
            if entry == name:
                return self.attributes(node)
        raise OSError(errno.ENOENT, name)

    def entries(self, directory: int) -> Iterable[tuple[str, int]]:
        if directory == ROOT:
            return [(snapshot.id, snapshot.node) for snapshot in self._catalogue.snapshots.values()]
        return [(file.kind.value, file.node) for file in self._snapshot(directory).files.values()]

    def opened(self, node: int, *, to_write: bool) -> None:
        # QEMU opens guest memory for writing, though it maps it private: that is a start.
        self._catalogue.opened(self._snapshot(node), self._file(node), to_write=to_write)

    def released(self, node: int) -> None:
        snapshot = self._catalogue.by_node.get(node - node % NODES)
        if snapshot is not None and (file := snapshot.file_of(node)) is not None:
            self._catalogue.released(snapshot, file)

    def read_now(self, node: int, offset: int, length: int) -> bytes | bytearray | None:
        snapshot, file = self._readable(node)
        if not snapshot.is_readable:
            return None
        data = self._content.read_now(file, offset, length)
        if data is not None:
            self._count(snapshot, file, offset, length)
        return data

    async def read(self, node: int, offset: int, length: int) -> bytes | bytearray:
        snapshot, file = self._readable(node)
        try:
            await snapshot.readable()
            self._count(snapshot, file, offset, length)
            return await self._content.read(file, offset, length)
        except OSError as error:
            log.warning("read failed", snapshot=snapshot.id, file=file.kind.value, offset=offset, error=str(error))
            raise OSError(errno.EIO, str(error)) from error

    def _named(self, name: str) -> list[tuple[str, int]]:
        snapshot = self._catalogue.snapshots.get(name)
        return [(name, snapshot.node)] if snapshot is not None else []

    def _snapshot(self, node: int) -> Snapshot:
        snapshot = self._catalogue.by_node.get(node - node % NODES)
        if snapshot is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return snapshot

    def _file(self, node: int) -> ServedFile:
        file = self._snapshot(node).file_of(node)
        if file is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return file

    def _readable(self, node: int) -> tuple[Snapshot, ServedFile]:
        try:
            return self._snapshot(node), self._file(node)
        except OSError as error:
            raise OSError(errno.EIO, "the snapshot was forgotten") from error

    def _count(self, snapshot: Snapshot, file: ServedFile, offset: int, length: int) -> None:
        file.reads += 1
        file.read_bytes += length
        if snapshot.recording.on and file.kind is FileKind.MEMORY:
            snapshot.recording.add(offset, length, time.monotonic())
