"""The index of a pack: for each position the chunk's hash, where it is stored and how; and the order by hash.

Positions are in the order in which chunks were added, so that pages that are neighbours in memory are neighbours in
the file. Everything is a numpy array over the mapped file: nothing is copied, the page cache holds it once for all
processes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forkypig.chunks import coding
from forkypig.chunks.crypt import TAG_BYTES, PackCipher
from forkypig.chunks.format import HASH_BYTES, MAX_CONTENT_BYTES, Hashes, References, keys_of
from forkypig.errors import Damaged

RAW = 1 << 31  # in `sizes`: stored as it is, not as a frame
_BYTES_PER_CHUNK = HASH_BYTES + 8 + 8 + 4 + 4
ABSENT = -1


def index_bytes(count: int) -> int:
    """The length of an index of so many chunks."""
    return count * _BYTES_PER_CHUNK + 8


@dataclass(frozen=True, slots=True, eq=False)
class PackIndex:
    """The arrays; `count` of each, `offsets` one more: the last is the end of the chunks."""

    hashes: Hashes
    offsets: References
    keys: References  # the first 8 bytes of the hashes, sorted
    sizes: npt.NDArray[np.uint32]  # length of the content, and RAW
    order: npt.NDArray[np.uint32]  # the position that each key belongs to

    @classmethod
    def build(cls, hashes: Hashes, offsets: References, sizes: npt.NDArray[np.uint32]) -> "PackIndex":
        """From what was written."""
        keys = keys_of(hashes)
        order = np.argsort(keys, kind="stable").astype(np.uint32)
        return cls(hashes, offsets, keys[order], sizes, order)

    def encode(self) -> bytes:
        """As it stands in the file, little-endian."""
        arrays = (self.hashes, self.offsets.astype("<u8"), self.keys.astype("<u8"))
        return b"".join(
            np.ascontiguousarray(part).tobytes()
            for part in (*arrays, self.sizes.astype("<u4"), self.order.astype("<u4"))
        )

    def opened(
        self, position: int, stored: bytes, cipher: PackCipher | None, address_key: bytes | None
    ) -> tuple[bytes, bytes]:
        """A chunk as it is stored: without its encryption, and its content when that is what this says. Raises
        Damaged."""
        expected = self.hashes[position].tobytes()
        size = int(self.sizes[position])
        if cipher is not None:
            stored = cipher.open(position, expected, stored)
        content = stored if size & RAW else coding.decompress(stored, size)
        if len(content) != size & ~RAW:
            raise Damaged("it is of another length than the index says")
        return stored, coding.checked(content, expected, address_key)

    @classmethod
    def decode(cls, view: memoryview, count: int, data_start: int, data_end: int) -> "PackIndex":
        """Over the bytes of an index, whose hash was verified; whoever wrote it may lie all the same. Raises
        Damaged."""
        assert len(view) == index_bytes(count)
        parts, at = [], 0
        for kind, length in (
            ("u1", HASH_BYTES * count),
            ("<u8", count + 1),
            ("<u8", count),
            ("<u4", count),
            ("<u4", count),
        ):
            part = np.frombuffer(view, kind, length, at)
            parts.append(part)
            at += part.nbytes
        index = cls(parts[0].reshape(-1, HASH_BYTES), *parts[1:])
        index._check(data_start, data_end)
        return index

    def _check(self, data_start: int, data_end: int) -> None:
        ends, count = self.offsets, len(self.hashes)
        if ends[0] != data_start or ends[-1] != data_end or (ends[1:] < ends[:-1]).any():
            raise Damaged("a pack's index has chunks outside of the pack")
        lengths = self.lengths
        if ((lengths == 0) | (lengths > MAX_CONTENT_BYTES)).any():
            raise Damaged("a pack's index has a chunk of an impossible length")
        # Nothing is stored in more room than its own length and the tag of the encryption.
        if ((ends[1:] - ends[:-1]) > lengths.astype(np.uint64) + np.uint64(TAG_BYTES)).any():
            raise Damaged("a pack's index has a chunk that is longer than its content")
        if count and int(self.order.max()) >= count:
            raise Damaged("a pack's index names chunks that it does not have")
        keys = self.keys
        if (keys[1:] < keys[:-1]).any() or not np.array_equal(keys_of(self.hashes)[self.order], keys):
            raise Damaged("a pack's index is not in order")

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def lengths(self) -> npt.NDArray[np.uint32]:
        """The length of each chunk's content."""
        return self.sizes & np.uint32(RAW - 1)

    def find(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """The position of each hash, ABSENT where it is not here."""
        return find_in(self.keys, self.order, self.hashes, hashes)


def find_in(keys: References, order: npt.NDArray[np.uint32], have: Hashes, wanted: Hashes) -> npt.NDArray[np.int64]:
    """The positions of `wanted` among `have`, whose first 8 bytes are sorted in `keys`; ABSENT where it is not.

    A guest could make pages whose hashes begin alike (that takes it 2³² tries), so the keys after the first are
    looked at too."""
    found = np.full(len(wanted), ABSENT, np.int64)
    if not len(keys) or not len(wanted):
        return found
    wanted_keys = keys_of(wanted)
    at = np.searchsorted(keys, wanted_keys)
    open_ = np.flatnonzero(at < len(keys))
    while len(open_):
        open_ = open_[keys[at[open_]] == wanted_keys[open_]]
        positions = order[at[open_]].astype(np.int64)
        same = (have[positions] == wanted[open_]).all(axis=1)
        found[open_[same]] = positions[same]
        open_ = open_[~same]
        at[open_] += 1
        open_ = open_[at[open_] < len(keys)]
    return found
