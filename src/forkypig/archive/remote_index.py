"""What an object store holds, by the indexes of its packs. They never change, so each is fetched once and kept."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from forkypig.archive.parcel import ParcelIndex
from forkypig.archive.remote import Remote
from forkypig.chunks import durable
from forkypig.chunks.crypt import Key
from forkypig.chunks.format import Hashes
from forkypig.chunks.pack_index import ABSENT
from forkypig.errors import Damaged, ForkyError

_MOST_INDEX = 1 << 28
_AT_ONCE = 8


class RemoteIndex:
    """All packs of a place, as they were when it was opened."""

    def __init__(self, remote: Remote, key: Key | None, cache: Path) -> None:
        """`cache`: where indexes of this place are kept; made if need be. Raises Damaged, InvalidRequest (the key)."""
        self._remote, self._key, self._cache = remote, key, cache
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = remote.list("indexes", ".index")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self.packs = [pack for pack in pool.map(self._load, names) if pack is not None]

    def _load(self, name: str) -> ParcelIndex | None:
        if len(name) != 32 or set(name) - set("0123456789abcdef"):
            return None  # not ours
        path = self._cache / f"{name}.index"
        with contextlib.suppress(OSError, Damaged):
            return self._checked(name, path.read_bytes())
        content = self._remote.get(f"indexes/{name}.index", _MOST_INDEX)
        if content is None:
            raise Damaged(f"indexes/{name}.index has vanished from {self._remote.url}")
        index = self._checked(name, content)
        with contextlib.suppress(ForkyError, OSError):  # what is kept spares time, nothing more
            durable.write_whole(path, content)
        return index

    def _checked(self, name: str, content: bytes) -> ParcelIndex:
        index = ParcelIndex(content, self._key, f"pack {name} of {self._remote.url}")
        if index.name != name:
            raise Damaged(f"indexes/{name}.index in {self._remote.url} is that of another pack")
        return index

    def find(self, hashes: Hashes) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        """For each hash the number of its pack in `packs` (ABSENT: it is in none) and its position there."""
        pack = np.full(len(hashes), ABSENT, np.int64)
        position = np.zeros(len(hashes), np.int64)
        for number, one in enumerate(self.packs):
            left = np.flatnonzero(pack == ABSENT)
            if not len(left):
                break
            found = one.index.find(hashes[left])
            here = found != ABSENT
            pack[left[here]], position[left[here]] = number, found[here]
        return pack, position
