"""The FUSE operations: /<snapshot id>/memory, disk and devices, read-only in content, cached by the kernel for ever.

What is bound never changes, so the kernel's page cache is never dropped (keep_cache): all children of a snapshot share
it. The mode bits allow writing and opening O_RDWR works, because QEMU's memory-backend-file opens so even for a
private mapping (`readonly` came later); writing itself is refused.
"""

import errno
import os
import stat
import time
from collections.abc import Sequence

import pyfuse3
import structlog

from forkypig.pager.catalogue import Catalogue
from forkypig.pager.content import Content
from forkypig.pager.served import FileKind, ServedFile
from forkypig.pager.snapshot import INODES, Snapshot

log = structlog.get_logger()

_FOREVER_S = 86_400.0
_ROOT = pyfuse3.ROOT_INODE


class FileSystem(pyfuse3.Operations):
    """Operations on a Catalogue."""

    def __init__(self, catalogue: Catalogue, content: Content) -> None:
        super().__init__()
        self._catalogue, self._content = catalogue, content
        catalogue.on_forget = self._forgotten

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.entry_timeout = entry.attr_timeout = _FOREVER_S
        if inode == _ROOT or inode % INODES == 0:
            if inode != _ROOT:
                self._snapshot(inode)
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o700, 2
        else:
            file = self._file(inode)
            entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o600, 1
            entry.st_size, entry.st_blksize = file.size_bytes, 4096
            entry.st_blocks = -(-file.size_bytes // 512)
        return entry

    def _snapshot(self, inode: int) -> Snapshot:
        snapshot = self._catalogue.by_inode.get(inode - inode % INODES)
        if snapshot is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return snapshot

    def _file(self, inode: int) -> ServedFile:
        file = self._snapshot(inode).file_of(inode)
        if file is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return file

    def _forgotten(self, snapshot: Snapshot) -> None:
        # From pyfuse3's own thread: the kernel takes the directory's lock, and a look-up that holds it waits for us.
        pyfuse3.invalidate_entry_async(_ROOT, snapshot.id.encode(), ignore_enoent=True)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if parent_inode == _ROOT:
            snapshot = self._catalogue.snapshots.get(os.fsdecode(name))
            if snapshot is not None:
                return self._attributes(snapshot.inode)
        elif parent_inode % INODES == 0:
            for file in self._snapshot(parent_inode).files.values():
                if file.kind.value.encode() == name:
                    return self._attributes(file.inode)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: object
    ) -> pyfuse3.EntryAttributes:
        entry = self._attributes(inode)
        if fields.update_size and attr.st_size != entry.st_size:
            raise pyfuse3.FUSEError(errno.EROFS)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EROFS)
        return entry

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        # QEMU opens guest memory for writing, though it maps it private: that is a start.
        self._catalogue.opened(self._snapshot(inode), self._file(inode), to_write=flags & os.O_ACCMODE == os.O_RDWR)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            snapshot, file = self._snapshot(fh), self._file(fh)
        except pyfuse3.FUSEError as error:  # it was forgotten
            raise pyfuse3.FUSEError(errno.EIO) from error
        try:
            await snapshot.readable()
            file.reads += 1
            file.read_bytes += size
            if snapshot.recording.on and file.kind is FileKind.MEMORY:
                snapshot.recording.add(off, size, time.monotonic())
            return await self._content.read(file, off, size)  # type: ignore[return-value]  # any buffer will do
        except OSError as error:
            log.warning("read failed", snapshot=snapshot.id, file=file.kind.value, offset=off, error=str(error))
            raise pyfuse3.FUSEError(errno.EIO) from error
        except Exception as error:  # the edge of a request: pyfuse3 would end the whole file system
            log.exception("read failed", snapshot=snapshot.id, file=file.kind.value, offset=off)
            raise pyfuse3.FUSEError(errno.EIO) from error

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        raise pyfuse3.FUSEError(errno.EROFS)

    async def release(self, fh: int) -> None:
        snapshot = self._catalogue.by_inode.get(fh - fh % INODES)
        if snapshot is not None and (file := snapshot.file_of(fh)) is not None:
            self._catalogue.released(snapshot, file)

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def opendir(self, inode: int, ctx: object) -> int:
        self._attributes(inode)
        return inode

    async def releasedir(self, fh: int) -> None:
        pass

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for inode, name in self._entries(fh):
            if inode > start_id:
                try:
                    entry = self._attributes(inode)
                except pyfuse3.FUSEError:
                    continue
                if not pyfuse3.readdir_reply(token, name, entry, inode):
                    return

    def _entries(self, inode: int) -> Sequence[tuple[int, bytes]]:
        if inode != _ROOT:
            return [(file.inode, file.kind.value.encode()) for file in self._snapshot(inode).files.values()]
        return sorted((snapshot.inode, snapshot.id.encode()) for snapshot in self._catalogue.snapshots.values())

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = sum(snapshot.size_bytes for snapshot in self._catalogue.snapshots.values()) // 4096
        data.f_files = len(self._catalogue.snapshots)
        data.f_namemax = 255
        return data
