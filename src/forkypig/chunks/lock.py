"""The store's lock: whoever adds packs, collects or waits for a quiet store holds it; readers need none."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from forkypig.errors import Busy


@contextlib.contextmanager
def exclusive(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock. With `wait` it takes as long as others hold it; without, Busy is raised. The kernel gives a
    dead process's lock back."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Busy("the store", "something is being packed or collected") from error
        yield
    finally:
        os.close(fd)
