"""The memory of a frozen QEMU process, as a source of pages.

A process that stands on a snapshot maps our own file MAP_PRIVATE. Reading such a mapping where the process has not
written would fault into ourselves, and wait for ever; so only pages that pagemap calls private are ever read from it
(Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 61 file or shared). A process that booted cold
has a shared memfd, which is read by descriptor: its holes read as zeros without being allocated.

All descriptors are opened while the machine still runs, so that binding costs nothing in its pause. They also pin
the process's identity: a pid that is used again is never taken for it.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from forkypig.chunks.format import PAGE_BYTES
from forkypig.errors import NotPossibleNow
from forkypig.pager.index import Mask


class FrozenMemory(Protocol):
    """The memory of one process; offsets are of guest memory, in bytes."""

    pidfd: int
    pid: int
    outlives_process: bool  # what was opened holds the pages, even when the process has ended

    def own_pages(self, first: int, count: int) -> Mask: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def read_into(self, view: memoryview, offset: int) -> None: ...
    def file(self) -> tuple[int, int]:
        """A descriptor to pread from, and where in it guest memory begins."""

    def close(self) -> None: ...


def _lost() -> OSError:
    return OSError(errno.EIO, "the frozen process has ended")


class PrivateMemory:
    """A MAP_PRIVATE mapping of the parent snapshot's file: only own pages may be read."""

    outlives_process = False

    def __init__(self, pid: int, pidfd: int, address: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self._address = address
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._pagemap)
            raise

    def own_pages(self, first: int, count: int) -> Mask:
        data = os.pread(self._pagemap, count * 8, (self._address // PAGE_BYTES + first) * 8)
        if len(data) != count * 8:
            raise _lost()
        flags = np.frombuffer(data, np.uint64) >> np.uint64(61)
        private: Mask = ((flags & np.uint64(1)) == 0) & (flags != 0)
        return private

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._mem, length, self._address + offset)
        if len(data) != length:
            raise _lost()
        return data

    def read_into(self, view: memoryview, offset: int) -> None:
        if os.preadv(self._mem, [view], self._address + offset) != len(view):
            raise _lost()

    def file(self) -> tuple[int, int]:
        return self._mem, self._address

    def close(self) -> None:
        for fd in (self._pagemap, self._mem, self.pidfd):
            os.close(fd)


class SharedMemory:
    """A memfd: its data extents are the own pages."""

    outlives_process = True

    def __init__(self, pid: int, pidfd: int, memfd: int, base: int) -> None:
        """`base` is where guest memory begins in the memfd."""
        self.pid, self.pidfd = pid, pidfd
        self._memfd, self._base = memfd, base

    def own_pages(self, first: int, count: int) -> Mask:
        own: Mask = np.zeros(count, np.bool_)
        position = begin = self._base + first * PAGE_BYTES
        end = begin + count * PAGE_BYTES
        while position < end:
            try:
                data = os.lseek(self._memfd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here on
                    break
                raise
            if data >= end:
                break
            position = os.lseek(self._memfd, data, os.SEEK_HOLE)
            own[(data - begin) // PAGE_BYTES : -(-(min(position, end) - begin) // PAGE_BYTES)] = True
        return own

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._memfd, length, self._base + offset)
        if len(data) != length:
            raise OSError(errno.EIO, "guest memory is shorter than it was")
        return data

    def read_into(self, view: memoryview, offset: int) -> None:
        if os.preadv(self._memfd, [view], self._base + offset) != len(view):
            raise OSError(errno.EIO, "guest memory is shorter than it was")

    def file(self) -> tuple[int, int]:
        return self._memfd, self._base

    def close(self) -> None:
        os.close(self._memfd)
        os.close(self.pidfd)


@dataclass(frozen=True, slots=True)
class Mapping:
    """The lines of /proc/<pid>/maps that cover a range: the kernel may have split it, but it is one file, in order."""

    start: int
    end: int
    shared: bool
    offset: int  # in the file, of `start`
    inode: int
    path: str


def find_mapping(maps: str, address: int, size_bytes: int) -> Mapping | None:
    """The mapping that covers [address, address + size_bytes) in the text of a maps file, or None."""
    found: Mapping | None = None
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if end <= address or start >= address + size_bytes:
            continue
        offset, inode = int(fields[2], 16), int(fields[4])
        path = fields[5] if len(fields) > 5 else ""
        if found is None:
            found = Mapping(start, end, fields[1][3] == "s", offset, inode, path)
        elif (start, inode, offset - found.offset) == (found.end, found.inode, start - found.start):
            found = Mapping(found.start, end, found.shared, found.offset, inode, path)
        else:
            return None
    if found is None or found.start > address or found.end < address + size_bytes:
        return None
    return found


def open_frozen(pid: int, address: int, size_bytes: int, parent: str) -> FrozenMemory:
    """Opens the guest memory of a process that is about to be frozen. Blocks: its maps need a lock of the process.

    `parent` is the snapshot that it stands on; empty when it booted cold. Raises NotPossibleNow when
    the process is gone, is not ours to read, or does not map there what it should.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise NotPossibleNow(f"process {pid} can't be frozen for a snapshot: it does not run (any more)") from error
    try:
        return _open_frozen(pid, pidfd, address, size_bytes, parent)
    except OSError as error:
        os.close(pidfd)
        raise NotPossibleNow(f"the memory of process {pid} can't be read: {error.strerror}") from error
    except NotPossibleNow:
        os.close(pidfd)
        raise


def _open_frozen(pid: int, pidfd: int, address: int, size_bytes: int, parent: str) -> FrozenMemory:
    mapping = find_mapping(Path(f"/proc/{pid}/maps").read_text(), address, size_bytes)
    if mapping is None:
        raise NotPossibleNow(f"process {pid} maps no {size_bytes >> 20} MiB of guest memory at {address:#x}")
    if parent:
        # Only the path's end: after a restart of ours the old mount is detached, and its path is cut off.
        is_file = mapping.path.endswith(f"/{parent}/memory")
        if mapping.shared or not is_file or mapping.offset + address - mapping.start != 0:
            found = mapping.path or "anonymous memory"
            raise NotPossibleNow(f"process {pid} maps {found} at {address:#x}, not the memory of {parent}, private")
        return PrivateMemory(pid, pidfd, address)
    if not mapping.shared:
        raise NotPossibleNow(f"process {pid} booted cold, but its memory at {address:#x} is not a shared memfd")
    return SharedMemory(pid, pidfd, _open_memfd(pid, mapping), mapping.offset + address - mapping.start)


def _open_memfd(pid: int, mapping: Mapping) -> int:
    """By the process's own descriptor, which needs no privilege; else by the mapping, which needs root."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith("/memfd:") and entry.stat().st_ino == mapping.inode:
                return os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # closed meanwhile
    return os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC)
