"""A parcel: exactly chosen chunks of a store as one pack, of which the length is known before a chunk is read.

In two parts: its index (header, index and footer of the pack), which says and vouches for what is in it, and its data,
the chunks. In an export the index comes first, so that every chunk can be verified as it is read; an object store has
the whole pack, and the index beside it, so that nobody has to fetch packs to see what they hold. Chunks are verified
when a parcel is packed and when it is unpacked; they are never compressed anew.
"""

import secrets
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from forkypig.chunks.crypt import SALT_BYTES, Key
from forkypig.chunks.format import Hashes, References, packs_of, positions_of
from forkypig.chunks.pack import (
    FOOTER_BYTES,
    HEADER_BYTES,
    check_key,
    decode_footer,
    decode_header,
    encode_footer,
    encode_header,
)
from forkypig.chunks.pack_index import PackIndex, index_bytes
from forkypig.chunks.store import Store
from forkypig.errors import Damaged

_CHUNKS_TOGETHER = 512


class Parcel:
    """Chunks of a store, to be sent."""

    def __init__(self, store: Store, references: References) -> None:
        """The references are packed ones, each chunk once. Raises Damaged, NotFound."""
        self._store, self._references = store, references
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._header = encode_header(store.key, self._salt)
        self.hashes, sizes, stored = _described(store, references)
        ends = np.cumsum(stored, dtype=np.uint64) + np.uint64(HEADER_BYTES)
        offsets = np.concatenate([np.array([HEADER_BYTES], np.uint64), ends])
        self._index = PackIndex.build(self.hashes, offsets, sizes).encode()
        self._data_end = int(offsets[-1])
        self._start = self._data_end + -self._data_end % 8
        count = len(references)
        self._footer = encode_footer(self._header, self._index, count, self._data_end, self._start)

    @property
    def data_bytes(self) -> int:
        """The length of its data."""
        return self._data_end - HEADER_BYTES

    def index(self) -> bytes:
        """Its first part."""
        return b"".join((self._header, self._index, self._footer))

    @property
    def name(self) -> str:
        """32 hex digits that name its content: where nothing is encrypted the same chunks have the same name."""
        return blake3(self._footer).hexdigest()[:32]

    def data(self) -> Iterator[bytes]:
        """The chunks, in pieces of some hundred KiB. Raises Damaged, NotFound."""
        cipher = self._store.key.pack_cipher(self._salt) if self._store.key else None
        for first in range(0, len(self._references), _CHUNKS_TOGETHER):
            part = self._references[first : first + _CHUNKS_TOGETHER]
            pieces = _opened(self._store, part)
            if cipher is not None:
                pieces = [
                    cipher.seal(first + n, self.hashes[first + n].tobytes(), piece) for n, piece in enumerate(pieces)
                ]
            yield b"".join(pieces)

    def pack(self) -> bytes:
        """All of it as a pack's file."""
        padding = bytes(self._start - self._data_end)
        return b"".join((self._header, *self.data(), padding, self._index, self._footer))


def _described(store: Store, references: References) -> tuple[Hashes, npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """Hash, length with RAW, and stored length of each chunk."""
    hashes = store.hashes(references)
    sizes = np.empty(len(references), np.uint32)
    stored = np.empty(len(references), np.uint64)
    numbers, positions = packs_of(references), positions_of(references)
    for number in np.unique(numbers).tolist():
        index = store.pack(number).index
        where = np.flatnonzero(numbers == number)
        at = positions[where]
        sizes[where] = index.sizes[at]
        stored[where] = index.offsets[at + 1] - index.offsets[at]
    return hashes, sizes, stored


def _opened(store: Store, references: References) -> list[bytes]:
    """The chunks as they are stored but for the encryption, verified; in the order of the references."""
    numbers, positions = packs_of(references), positions_of(references)
    bounds = np.flatnonzero(np.diff(numbers)) + 1
    found: list[bytes] = []
    for part in np.split(np.arange(len(references)), bounds):
        if len(part):
            found += store.pack(int(numbers[part[0]])).opened(positions[part].tolist())
    return found


class ParcelIndex:
    """What a parcel from elsewhere says that it holds; verified, but whoever made it may be anybody."""

    def __init__(self, content: bytes, key: Key | None, what: str) -> None:
        """`content`: what `Parcel.index` gives. Raises Damaged, InvalidRequest for another key."""
        if len(content) < HEADER_BYTES + index_bytes(0) + FOOTER_BYTES:
            raise Damaged(f"{what} is cut off")
        try:
            header = content[:HEADER_BYTES]
            key_id, salt = decode_header(header)
            check_key(key_id, key, what)
            count, data_end, start, digest = decode_footer(content[-FOOTER_BYTES:])
            view = memoryview(content)[HEADER_BYTES:-FOOTER_BYTES]
            if index_bytes(count) != len(view) or not 0 <= start - data_end < 8:
                raise Damaged("its parts don't add up to its length")
            if blake3(header).update(view).digest() != digest:
                raise Damaged("its index is damaged")
            self.index = PackIndex.decode(view, count, HEADER_BYTES, data_end)
        except (Damaged, struct.error) as error:
            raise Damaged(f"{what}: {error}") from error
        self.data_bytes = data_end - HEADER_BYTES
        self.name = blake3(content[-FOOTER_BYTES:]).hexdigest()[:32]
        self._what, self._address_key = what, key.address_key if key else None
        self._cipher = key.pack_cipher(salt) if key else None

    def stored_lengths(self) -> npt.NDArray[np.int64]:
        """How long each chunk is as it is stored."""
        ends = self.index.offsets.astype(np.int64)
        return np.asarray(ends[1:] - ends[:-1], np.int64)

    def opened(self, position: int, stored: bytes) -> bytes:
        """A chunk without its encryption, when its content is what the index says. Raises Damaged."""
        try:
            return self.index.opened(position, stored, self._cipher, self._address_key)[0]
        except Damaged as error:
            chunk = self.index.hashes[position].tobytes().hex()
            raise Damaged(f"{self._what}, chunk {chunk}: {error}") from error
