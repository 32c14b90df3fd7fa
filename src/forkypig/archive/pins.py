"""What running transfers need of the store, so that a collection leaves it alone.

A transfer says which hashes it relies on in a file that it holds locked: store/transfers/*.pin, 32 bytes a hash. The
kernel drops the lock of a process that dies, and the next collection removes its file. Whoever pins looks into the
store afterwards, with the store's lock held: what is found then stays.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from forkypig.chunks import durable
from forkypig.chunks.format import HASH_BYTES, Hashes, References
from forkypig.chunks.store import Store

_SUFFIX = ".pin"


class Pins:
    """One transfer's."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path

    def add(self, hashes: Hashes) -> None:
        """From here on no collection that begins takes these. Raises ResourceExhausted."""
        with durable.room(self._path):
            durable.write_all(self._fd, [hashes.tobytes()])


@contextlib.contextmanager
def pinning(store: Store) -> Iterator[Pins]:
    """A transfer is under way as long as the block lasts."""
    directory = store.directory / "transfers"
    directory.mkdir(mode=0o700, exist_ok=True)
    while True:
        path = directory / f"{secrets.token_hex(8)}{_SUFFIX}"
        with durable.room(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else a collection has taken it for a dead one's before it was locked
            break
        os.close(fd)
    try:
        yield Pins(fd, path)
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def pinned(store: Store) -> Iterator[References]:
    """The references of what running transfers need; removes the files of those that died. The store's lock is held."""
    directory = store.directory / "transfers"
    for path in sorted(directory.glob(f"*{_SUFFIX}")) if directory.is_dir() else []:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # it has ended
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            content = path.read_bytes()
            whole = content[: len(content) // HASH_BYTES * HASH_BYTES]
            yield store.find(np.frombuffer(whole, np.uint8).reshape(-1, HASH_BYTES))
        finally:
            os.close(fd)
