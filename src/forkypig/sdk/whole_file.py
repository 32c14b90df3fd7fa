"""A file that appears under its name when it is complete and on the disk, and not before."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
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
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with appearing(target.name, directory, 0o666) as file:
            size = await _fill(file, contents)
            await asyncio.to_thread(os.fsync, file.fileno())
        await asyncio.to_thread(os.fsync, directory)
    finally:
        os.close(directory)
    return size


@contextlib.contextmanager
def appearing(name: str, directory: int, mode: int) -> Iterator[IO[bytes]]:
    """A new file, to be written in the block, that is called `name` in the open directory when the block has ended
    well, in place of what was called so. Else nothing is left of it, as far as `write_whole` says. Raises OSError."""
    part = f".{name}.{os.getpid()}.part"
    with contextlib.ExitStack() as undo:
        try:
            fd, has_name = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=directory), False
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd, has_name = os.open(part, flags, mode, dir_fd=directory), True
        file: IO[bytes] = undo.enter_context(os.fdopen(fd, "wb"))
        if has_name:
            undo.callback(_remove, part, directory)
        yield file
        file.flush()
        if not has_name:
            with contextlib.suppress(FileExistsError):
                _give_name(fd, name, directory)
                return
            _give_name(fd, part, directory)
            undo.callback(_remove, part, directory)
        os.replace(part, name, src_dir_fd=directory, dst_dir_fd=directory)  # a link can't replace what is there


async def _fill(file: IO[bytes], contents: AsyncIterator[bytes]) -> int:
    size = 0
    async for content in contents:
        await asyncio.to_thread(file.write, content)
        size += len(content)
    file.flush()
    return size


def _give_name(fd: int, name: str, directory: int) -> None:
    # As linkat(2) has it for O_TMPFILE.
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def _remove(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
