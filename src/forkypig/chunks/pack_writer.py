"""Writes one pack: compresses on all cores behind the caller, keeps the order of what was added, and makes it durable.

The position of a chunk is known when it is added; only a few MiB wait to be compressed or written, whatever the
pack's size.
"""

import contextlib
import os
import secrets
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forkypig.chunks import coding, durable, faults
from forkypig.chunks.crypt import SALT_BYTES, Key, PackCipher
from forkypig.chunks.format import HASH_BYTES, Hashes
from forkypig.chunks.pack import HEADER_BYTES, encode_footer, encode_header
from forkypig.chunks.pack_index import ABSENT, RAW, PackIndex, find_in
from forkypig.errors import ResourceExhausted

THREADS = 2
_WAITING = 8  # batches that may wait; with 4 MiB each the memory that a packing takes
_MAX_CHUNKS = 1 << 31
_SYNC_EVERY_BYTES = 8 << 20  # the disk is busy while we compress, not after

_Stored = tuple[list[bytes], npt.NDArray[np.uint32]]  # the pieces, their lengths and RAW


class Written:
    """The hashes of what was added so far, to be found again: sorted runs that are merged as they grow alike in
    size."""

    def __init__(self) -> None:
        self._room: Hashes = np.empty((4096, HASH_BYTES), np.uint8)  # grows by doubling
        self._runs: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]] = []
        self.count = 0

    def add(self, hashes: Hashes) -> None:
        """The next chunks."""
        part = PackIndex.build(hashes, np.zeros(0, np.uint64), np.zeros(0, np.uint32))
        keys, order = part.keys, part.order + np.uint32(self.count)
        after = self.count + len(hashes)
        if after > len(self._room):
            grown = np.empty((max(after, 2 * len(self._room)), HASH_BYTES), np.uint8)
            grown[: self.count] = self.hashes()
            self._room = grown
        self._room[self.count : after] = hashes
        self.count = after
        while self._runs and len(self._runs[-1][0]) <= 2 * len(keys):
            below_keys, below_order = self._runs.pop()
            keys, order = np.concatenate([below_keys, keys]), np.concatenate([below_order, order])
            by_key = np.argsort(keys, kind="stable")
            keys, order = keys[by_key], order[by_key]
        self._runs.append((keys, order))

    def hashes(self) -> Hashes:
        """All of them, by position."""
        return self._room[: self.count]

    def find(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """The position of each, ABSENT where it was not added."""
        found = np.full(len(hashes), ABSENT, np.int64)
        have = self.hashes()
        for keys, order in self._runs:
            left = np.flatnonzero(found == ABSENT)
            if not len(left):
                break
            found[left] = find_in(keys, order, have, hashes[left])
        return found


class PackWriter:
    """One pack that is being written, as NUMBER.pack.part. Belongs to one thread."""

    def __init__(self, path: Path, key: Key | None = None) -> None:
        """Raises ResourceExhausted when there is no room for it."""
        self.path = path
        self._part = path.with_name(path.name + durable.PART)
        self._cipher: PackCipher | None = None
        salt = secrets.token_bytes(SALT_BYTES)
        if key is not None:
            self._cipher = key.pack_cipher(salt)
        self._header = encode_header(key, salt)
        self.written = Written()
        self._ends: list[npt.NDArray[np.uint64]] = []
        self._sizes: list[npt.NDArray[np.uint32]] = []
        self._at = 0
        self._waiting: deque[Future[_Stored]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "pack")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._syncing: Future[None] | None = None
        self._synced = 0
        with durable.room(path):
            self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._open = True
        try:
            with durable.room(path):
                self._write([self._header])
        except BaseException:
            self.abandon()
            raise
        faults.reach("part-made")

    def __len__(self) -> int:
        return self.written.count

    @property
    def stored_bytes(self) -> int:
        """What is written so far."""
        return self._at

    def add(self, hashes: Hashes, content: memoryview, lengths: npt.NDArray[np.int64]) -> int:
        """Adds chunks that are not there yet: their addresses, their contents one after the other, the length of
        each. Returns the position of the first. `content` must not change afterwards. Raises ResourceExhausted on a
        full disk."""
        first = self._reserve(hashes)
        self._waiting.append(self._pool.submit(self._compress, first, hashes, content, lengths))
        while len(self._waiting) > _WAITING or (self._waiting and self._waiting[0].done()):
            self._write_next()
        return first

    def add_stored(self, hashes: Hashes, pieces: list[bytes], sizes: npt.NDArray[np.uint32]) -> int:
        """Adds chunks as another pack has them (opened, if it is encrypted), with their lengths and RAW."""
        first = self._reserve(hashes)
        ready: Future[_Stored] = Future()
        ready.set_result((self._sealed(first, hashes, pieces), sizes))
        self._waiting.append(ready)
        while self._waiting and self._waiting[0].done():
            self._write_next()
        return first

    def _reserve(self, hashes: Hashes) -> int:
        first = self.written.count
        if first + len(hashes) > _MAX_CHUNKS:
            raise ResourceExhausted(f"pack {self.path.name} has more chunks than a pack can have")
        self.written.add(hashes)
        return first

    def _compress(self, first: int, hashes: Hashes, content: memoryview, lengths: npt.NDArray[np.int64]) -> _Stored:
        pieces, raw = coding.compress_each(content, lengths)
        sizes = lengths.astype(np.uint32) | np.where(raw, np.uint32(RAW), np.uint32(0))
        return self._sealed(first, hashes, pieces), sizes

    def _sealed(self, first: int, hashes: Hashes, pieces: list[bytes]) -> list[bytes]:
        if self._cipher is None:
            return pieces
        seal = self._cipher.seal
        return [seal(first + n, hashes[n].tobytes(), piece) for n, piece in enumerate(pieces)]

    def _write_next(self) -> None:
        pieces, sizes = self._waiting.popleft().result()
        ends = np.cumsum(np.fromiter(map(len, pieces), np.uint64, len(pieces))) + np.uint64(self._at)
        self._ends.append(ends)
        self._sizes.append(sizes)
        with durable.room(self.path):
            self._write(pieces)
            self._sync_some()
        faults.reach("chunks-written")

    def _write(self, pieces: list[bytes]) -> None:
        durable.write_all(self._fd, pieces)
        self._at += sum(map(len, pieces))

    def _sync_some(self) -> None:
        """Has the disk begin with what was written; an error of an earlier beginning is raised here, and only here."""
        if self._at - self._synced < _SYNC_EVERY_BYTES or (self._syncing is not None and not self._syncing.done()):
            return
        self._synced_so_far()
        self._synced = self._at
        self._syncing = self._syncer.submit(os.fdatasync, self._fd)

    def _synced_so_far(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def finish(self) -> None:
        """Everything is on disk and the pack has its name. Raises ResourceExhausted; then it is gone."""
        while self._waiting:
            self._write_next()
        self._pool.shutdown()
        offsets = np.concatenate([np.array([HEADER_BYTES], np.uint64), *self._ends])
        sizes = np.concatenate([np.zeros(0, np.uint32), *self._sizes])
        index = PackIndex.build(self.written.hashes(), offsets, sizes).encode()
        data_end = self._at
        with durable.room(self.path):
            self._write([bytes(-data_end % 8)])
            start = self._at
            self._write([index, encode_footer(self._header, index, len(sizes), data_end, start)])
            faults.reach("index-written")
            self._synced_so_far()
            os.fsync(self._fd)
        faults.reach("part-synced")
        self._part.rename(self.path)
        faults.reach("pack-renamed")
        durable.sync_directory(self.path.parent)
        faults.reach("packs-synced")
        self._syncer.shutdown()
        self._close()

    def abandon(self) -> None:
        """Nothing of it stays, unless it is finished."""
        if not self._open:
            return
        for waiting in self._waiting:
            waiting.cancel()
        self._pool.shutdown()
        self._syncer.shutdown()
        self._close()
        with contextlib.suppress(FileNotFoundError):
            self._part.unlink()

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)
