"""Files that are there whole or not at all, also after a power cut; a full disk is told as what it is."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from forkypig.errors import ResourceExhausted

PART = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Turns the error of a full disk into ResourceExhausted; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResourceExhausted(f"no room to write {path}: free some space on its disk ({error.strerror})") from error


def sync_file(path: Path) -> None:
    """Makes the content of a file durable, whoever wrote it."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, content: bytes, step: Callable[[str], None] = lambda _: None, name: str = "") -> None:
    """Writes a small file so that it has its old content or the new, durably. `step` is told of NAME-written and
    NAME-renamed.

    Raises ResourceExhausted on a full disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")  # others may write the same at this moment
    try:
        with room(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        step(f"{name}-written")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    step(f"{name}-renamed")
    sync_directory(path.parent)


def write_all(fd: int, pieces: list[bytes]) -> None:
    """Writes all of it at the end of a file."""
    rest = memoryview(b"".join(pieces))
    while rest:
        rest = rest[os.write(fd, rest) :]
