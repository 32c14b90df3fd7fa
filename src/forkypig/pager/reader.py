"""`python -m forkypig.pager.reader SOCKET_FD STORE`: decompresses and verifies for the holder (reader_link).

Stateless. Its death costs a delay, so whatever can go wrong with data goes wrong here. It ends with its socket.

    request     id u64, length u32, then `length` bytes: a letter and what it asks
        R       length u16 and path of the base image, then references u64: pages (BASE: of that number)
        E       JSON: snapshot, section, first region, number of regions: the references of their pages
        D       id of a snapshot: its device state
        W       references u64 of pages that are asked for soon
        S       JSON: bytes in packs, number of chunks
    answer      id u64, errno i32, length u32, then what was asked for, or the text of what went wrong
"""

import errno
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from forkypig.chunks import manifest_file
from forkypig.chunks.format import BASE, PAGE_BYTES
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.store import Store, open_store
from forkypig.errors import ForkyError
from forkypig.model import SnapshotId

REQUEST = struct.Struct("<QI")
ANSWER = struct.Struct("<QiI")
_ZERO_PAGE = bytes(PAGE_BYTES)
_MOST_BASES = 16
_T = TypeVar("_T")


class _Closed(Exception):
    """The holder has gone."""


class Reader:
    """Answers requests from a store."""

    def __init__(self, directory: Path) -> None:
        self._store = open_store(directory)

    def answer(self, request: bytes) -> bytes:
        """Raises OSError or ForkyError."""
        if request[:1] == b"R":
            return self._read(request)
        if request[:1] == b"D":
            found = _manifest(self._store, request[1:].decode())
            return self._fresh(lambda: found.devices.read(self._store))
        if request[:1] == b"W":
            self._fresh(lambda: self._store.will_need(np.frombuffer(request, "<u8", offset=1).astype(np.uint64)))
            return b""
        if request[:1] == b"S":
            return self._size()
        return self._expand(**json.loads(request[1:]))

    def _read(self, request: bytes) -> bytes:
        (length,) = struct.unpack_from("<H", request, 1)
        base = request[3 : 3 + length]
        references = np.frombuffer(request, "<u8", offset=3 + length)
        pages = [_ZERO_PAGE] * len(references)
        of_base = (references & np.uint64(BASE)) != 0
        stored = np.flatnonzero((references != 0) & ~of_base)
        if len(stored):
            content = self._fresh(lambda: self._store.read(references[stored].tolist()))
            for at, page in zip(stored.tolist(), content, strict=True):
                pages[at] = page
        if of_base.any():
            fd = _base(os.fsdecode(base))
            for at in np.flatnonzero(of_base).tolist():
                page = os.pread(fd, PAGE_BYTES, (int(references[at]) ^ BASE) * PAGE_BYTES)
                pages[at] = page + _ZERO_PAGE[len(page) :]
        return b"".join(pages)

    def _expand(self, snapshot: str, section: str, first: int, count: int) -> bytes:
        found = _manifest(self._store, snapshot)
        part = found.disk if section == "disk" else found.memory
        regions = self._fresh(lambda: part.expand_regions(self._store, range(first, first + count)))
        return b"".join(region.astype("<u8", copy=False).tobytes() for region in regions)

    def _size(self) -> bytes:
        self._store.refresh()
        packs = [self._store.pack(number) for number in self._store.numbers]
        return json.dumps([sum(pack.size_bytes for pack in packs), sum(len(pack) for pack in packs)]).encode()

    def _fresh(self, work: Callable[[], _T]) -> _T:
        """Packs that were added since we looked are found the second time."""
        try:
            return work()
        except (ForkyError, OSError):
            self._store.refresh()
            return work()


@lru_cache(_MOST_BASES)
def _base(path: str) -> int:
    if not path:
        raise OSError(errno.ENOENT, "it is not known where the base image lies")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@lru_cache(8)
def _manifest(store: Store, snapshot: str) -> Manifest:
    return manifest_file.load(store, SnapshotId(snapshot))


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Raises _Closed."""
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) != length:
        raise _Closed
    return data


def serve(connection: socket.socket, reader: Reader) -> None:
    """Answers until the holder goes."""
    while True:
        number, length = REQUEST.unpack(receive(connection, REQUEST.size))
        request = receive(connection, length)
        try:
            data, code = reader.answer(request), 0
        except OSError as error:
            data, code = str(error).encode(), error.errno or errno.EIO
        except Exception as error:  # the edge of a request: the holder says it to whoever reads
            data, code = f"{type(error).__name__}: {error}".encode(), errno.EIO
        connection.sendall(ANSWER.pack(number, code, len(data)) + data)


def main() -> int:
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        serve(connection, Reader(Path(sys.argv[2])))
    except (_Closed, ConnectionError):
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
