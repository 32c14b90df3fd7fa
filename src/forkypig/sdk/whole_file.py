"""A file that appears under its name when it is complete and on the disk, and not before."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from forkypig import errors

# What O_TMPFILE says where it can't be had: by NFS, FUSE and FAT, for one (open(2)).
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


async def write_whole(target: Path, contents: AsyncIterator[bytes]) -> int:
    """Writes a file, whole or not at all, durably; returns its length in bytes. Until the end it has no name, where the
    file system knows such files: then nothing is left of it even if this process is killed. Elsewhere it is called
    `.<name>.<pid>.part` so long. A pipe or a device is written into as it comes.

    Raises InvalidRequest where it can't be, ResourceExhausted, OSError."""
    if not target.parent.is_dir() or target.is_dir():
        wrong = f"«{target}» is a directory" if target.is_dir() else f"there is no directory «{target.parent}»"
        raise errors.InvalidRequest(f"{wrong}: name a file in a directory that is there")
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                return await _fill(file, contents)
        return await _write(target, contents)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.ResourceExhausted(
                f"«{target}» was not written: its disk is full; make room there, or name another place"
            ) from error
        raise


async def _write(target: Path, contents: AsyncIterator[bytes]) -> int:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with contextlib.ExitStack() as undo:
        try:
            fd = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            file: IO[bytes] = undo.enter_context(os.fdopen(fd, "wb"))
            has_name = False
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            file = undo.enter_context(part.open("xb"))
            has_name = True
        undo.callback(part.unlink, missing_ok=True)
        size = await _fill(file, contents)
        await asyncio.to_thread(os.fsync, file.fileno())
        if not has_name:
            _give_name(file.fileno(), part)
        part.replace(target)  # a link can't replace what is there
        await asyncio.to_thread(_sync_directory, target.parent)
    return size


async def _fill(file: IO[bytes], contents: AsyncIterator[bytes]) -> int:
    size = 0
    async for content in contents:
        await asyncio.to_thread(file.write, content)
        size += len(content)
    file.flush()
    return size


def _give_name(fd: int, name: Path) -> None:
    # As linkat(2) has it for O_TMPFILE. Python calls linkat, and not link, which does not follow, only if it is given a
    # descriptor of a directory; this one is not used, as the path is absolute.
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
