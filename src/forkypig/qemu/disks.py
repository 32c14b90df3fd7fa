"""qcow2 overlays. A machine writes to one overlay; a split leaves it behind, read-only for ever, below new ones.

An empty overlay depends on nothing but its size and the name of what it stands on. So qemu-img makes one blank per
size, with room for the longest name, and each overlay is a copy with its name written in: a fraction of a millisecond
where a qemu-img process costs 20 ms of CPU. Source of the layout: docs/interop/qcow2.txt in QEMU's source, "Header".
"""

import asyncio
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import struct
import time
from pathlib import Path

from forkypig.errors import InternalError, InvalidRequest, ResourceExhausted, full_disk_told
from forkypig.qemu.image_tool import qemu_img

# A sync of nothing takes 0.5 to 2 ms on an SSD. On a disk that is always slower, eight are enough to have tried.
_CALM_S, _LONGEST_S, _SYNCS = 0.005, 1.0, 8
_LONGEST_NAME = 1023  # of a backing file, by the format
_IO_URING_SETUP = 425  # the number of the system call, on every architecture
# magic, version, backing_file_offset, backing_file_size: bytes 0 to 19 of the header, big-endian
_HEADER = struct.Struct(">4sIQI")


@functools.cache
def aio_engine() -> str:
    """How QEMU should read files here: "io_uring" unless the kernel lacks or forbids it, then "threads"."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 0, None)  # always refused: EINVAL or EFAULT where there is an io_uring
    return "threads" if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EACCES) else "io_uring"


class Overlays:
    """Makes overlays; keeps the blanks in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._making = asyncio.Lock()

    async def create(self, path: Path, *, backing: Path, backing_format: str, size_mib: int) -> None:
        """Makes an empty overlay of `size_mib` over `backing` ("raw" or "qcow2"). The overlay is there whole or not
        at all. Raises ResourceExhausted when the disk is full."""
        name = os.fsencode(backing)
        if len(name) > _LONGEST_NAME:
            raise InvalidRequest(f"«{backing}» is too long for a backing file: choose a shorter FORKY_HOME")
        try:
            with full_disk_told():
                blank = await self._blank(backing_format, size_mib)
                await asyncio.to_thread(_copy, blank, path, name)
        except (OSError, ResourceExhausted):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise

    async def _blank(self, backing_format: str, size_mib: int) -> Path:
        blank = self._directory / f"{backing_format}-{size_mib}.qcow2"
        async with self._making:
            if not blank.exists():
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                new = blank.with_suffix(".new")
                await qemu_img(
                    *("create", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", "x" * _LONGEST_NAME),
                    *(str(new), f"{size_mib}M"),
                )
                new.replace(blank)
        return blank


def sync(path: Path) -> None:
    """What is in a disk's file, and that there is one, outlasts a power cut from here on. Blocks. Raises OSError,
    ResourceExhausted."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with full_disk_told():
            os.fsync(fd)
    finally:
        os.close(fd)


def write_back(path: Path) -> float:
    """Writes a disk's dirty pages out ahead of the pause, and waits for a moment in which the host's disk answers at
    once: `stop` and the save flush what is left. Blocks for up to a second, and a sync; returns what the last sync
    took, in s."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        began = ended = time.monotonic()
        for _ in range(_SYNCS):
            before = ended
            os.fdatasync(fd)
            ended = time.monotonic()
            if ended - before < _CALM_S or ended - began > _LONGEST_S:
                break
        return ended - before
    finally:
        os.close(fd)


def _copy(blank: Path, path: Path, backing: bytes) -> None:
    shutil.copyfile(blank, path)
    path.chmod(0o600)
    with path.open("r+b") as file:
        magic, version, offset, size = _HEADER.unpack(file.read(_HEADER.size))
        if magic != b"QFI\xfb" or version != 3 or size != _LONGEST_NAME:
            raise InternalError(f"{blank} is not a blank overlay: remove it")
        file.seek(0)
        file.write(_HEADER.pack(magic, version, offset, len(backing)))
        file.seek(offset)
        file.write(backing.ljust(_LONGEST_NAME, b"\0"))
