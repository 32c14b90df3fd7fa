"""The packer's store, open from one job to the next: a packing then costs nothing that the store's size has a part in.

A pack that is collected meanwhile would keep its room on the disk as long as we have it open; the kernel tells us of it
(inotify(7), which Python's own library has not), and it is let go of at once.
"""

import ctypes
import os
import select
import socket
from contextlib import suppress
from pathlib import Path

import structlog

from forkypig.chunks.store import Store, open_store

log = structlog.get_logger()

_IN_DELETE = 0x200
_EVENTS_BYTES = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


class KeptStore:
    """The store in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._store: Store | None = None
        self._removals: int | None = None  # an inotify descriptor

    def open(self) -> Store:
        """The store, open already or now. Raises ForkyError, OSError."""
        if self._store is None:
            self._store = open_store(self._directory)
            if self._removals is None:
                self._removals = _removals_from(self._directory / "packs")
        return self._store

    def wait(self, connection: socket.socket) -> None:
        """Until there is something to read from `connection`."""
        if self._removals is None:
            self.close()  # where nobody tells us, nothing is kept
            return
        news = select.poll()  # select() takes no descriptor above 1023, and each pack that is kept has one
        news.register(connection, select.POLLIN)
        news.register(self._removals, select.POLLIN)
        while self._store is not None and connection.fileno() not in dict(news.poll()):
            with suppress(BlockingIOError):
                os.read(self._removals, _EVENTS_BYTES)
            self._store.refresh()

    def close(self) -> None:
        """It may know what is no longer so."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _removals_from(directory: Path) -> int | None:
    """Readable when a file was removed from the directory; None where the host has no room for another such watch."""
    fd = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if fd >= 0 and _libc.inotify_add_watch(fd, os.fsencode(directory), _IN_DELETE) >= 0:
        return fd
    error = os.strerror(ctypes.get_errno())
    if fd >= 0:
        os.close(fd)
    log.warning("the store is opened anew for each packing: its directory can't be watched", error=error)
    return None
