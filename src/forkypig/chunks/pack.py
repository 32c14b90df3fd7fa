"""A pack: a file of many chunks with its index. Written once, never changed. Its bytes are in docs/format.md.

header (64 bytes) | chunks | padding to 8 | index | footer (96 bytes)
"""

import errno
import mmap
import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from forkypig.chunks.crypt import KEY_ID_BYTES, NO_KEY_ID, SALT_BYTES, Key
from forkypig.chunks.pack_index import PackIndex, index_bytes
from forkypig.errors import Damaged, InvalidRequest

VERSION = 1
_HEADER = struct.Struct(f"<8sHHI{KEY_ID_BYTES}s{SALT_BYTES}sQ")
_FOOTER = struct.Struct("<8sQQQ32s32s")
_MAGIC, _END_MAGIC = b"FPIGPACK", b"KCAPGIPF"
HEADER_BYTES, FOOTER_BYTES = _HEADER.size, _FOOTER.size
_TOGETHER = 1 << 20  # what is read at once at most
_APART = 1 << 15  # gaps that are read with what lies around them


def encode_header(key: Key | None, salt: bytes) -> bytes:
    """The first 64 bytes."""
    return _HEADER.pack(_MAGIC, VERSION, 0, 0, key.id if key else NO_KEY_ID, salt if key else bytes(SALT_BYTES), 0)


def encode_footer(header: bytes, index: bytes, count: int, data_end: int, index_start: int) -> bytes:
    """The last 96 bytes."""
    digest = blake3(header).update(index).digest()
    body = _FOOTER.pack(_END_MAGIC, count, data_end, index_start, digest, bytes(32))[:-32]
    return body + blake3(body).digest()


def decode_header(header: bytes) -> tuple[bytes, bytes]:
    """The id of its key and its salt. Raises Damaged."""
    magic, version, flags, reserved, key_id, salt, more = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise Damaged("it is not a pack")
    if version != VERSION or flags or reserved or more:
        raise Damaged(f"its format is {version}.{flags}, and this Forky Pig reads {VERSION}.0: use a newer one")
    return key_id, salt


def decode_footer(footer: bytes) -> tuple[int, int, int, bytes]:
    """How many chunks there are, where they end, where the index starts, and the hash of header and index. Raises
    Damaged."""
    end, count, data_end, index_start, digest, own = _FOOTER.unpack(footer)
    if end != _END_MAGIC or blake3(footer[:-32]).digest() != own:
        raise Damaged("its end is damaged")
    return count, data_end, index_start, digest


def check_key(found: bytes, key: Key | None, what: str) -> None:
    """Raises InvalidRequest when `key` is not that with the id `found`."""
    if found == (key.id if key else NO_KEY_ID):
        return
    if key is None:
        raise InvalidRequest(
            f"{what} is encrypted with key {found.hex()}: it takes a home with that key (FORKY_STORE_KEY)"
        )
    if found == NO_KEY_ID:
        raise InvalidRequest(
            f"{what} is not encrypted: it takes a home without a key (FORKY_STORE_KEY is {key.id.hex()})"
        )
    raise InvalidRequest(f"{what} is encrypted with key {found.hex()}, and FORKY_STORE_KEY is key {key.id.hex()}")


class PackFile:
    """An open pack, its index verified. Chunks are read by pread: a damaged disk is an error then, not a signal. The
    index is mapped: who can't afford to die of a disk that fails later leaves packs to a process that can."""

    def __init__(self, path: Path, key: Key | None = None) -> None:
        """Raises Damaged, InvalidRequest for another key than the pack's, FileNotFoundError."""
        self.path = path
        self._address_key = key.address_key if key else None
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._closing = weakref.finalize(self, os.close, self._fd)  # also where nobody calls `close`
        try:
            self.size_bytes = os.fstat(self._fd).st_size
            header, self.index = self._open(key)
        except Damaged as error:
            self.close()
            raise Damaged(f"pack {path.name}: {error}") from error
        except OSError as error:
            self.close()
            if error.errno != errno.EIO:
                raise
            raise Damaged(f"pack {path.name} can't be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise
        self._cipher = key.pack_cipher(header[-SALT_BYTES - 8 : -8]) if key else None

    def _open(self, key: Key | None) -> tuple[bytes, PackIndex]:
        if self.size_bytes < HEADER_BYTES + FOOTER_BYTES + index_bytes(0):
            raise Damaged("it is too short")
        header = os.pread(self._fd, HEADER_BYTES, 0)
        footer = os.pread(self._fd, FOOTER_BYTES, self.size_bytes - FOOTER_BYTES)
        if len(header) != HEADER_BYTES or len(footer) != FOOTER_BYTES:
            raise Damaged("it became shorter while it was opened")
        key_id, _salt = decode_header(header)
        count, data_end, index_start, digest = decode_footer(footer)
        check_key(key_id, key, f"pack {self.path.name}")
        # Python's numbers don't overflow, so a lying count can't make these agree.
        if index_start + index_bytes(count) + FOOTER_BYTES != self.size_bytes or not 0 <= index_start - data_end < 8:
            raise Damaged("its parts don't add up to its length")
        # By pread before it is mapped: a disk that can't give it must not kill the next process that opens it too.
        hasher = blake3(header)
        index_end = index_start + index_bytes(count)
        for at in range(index_start, index_end, _TOGETHER):
            hasher.update(os.pread(self._fd, min(_TOGETHER, index_end - at), at))
        if hasher.digest() != digest:
            raise Damaged("its index is damaged")
        view = memoryview(mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))[index_start:index_end]
        return header, PackIndex.decode(view, count, HEADER_BYTES, data_end)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def data_bytes(self) -> int:
        """What the chunks take."""
        return int(self.index.offsets[-1]) - HEADER_BYTES

    def will_need(self, positions: Sequence[int]) -> None:
        """Has the kernel read these chunks from the disk, all at once and without waiting for them."""
        offsets = self.index.offsets
        end = start = 0
        for position in sorted(positions):
            if int(offsets[position]) > end + _APART:
                os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)
                start = int(offsets[position])
            end = int(offsets[position + 1])
        os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, position: int) -> bytes:
        """The content of one chunk, verified. Raises Damaged."""
        return self.read_each([position])[0]

    def read_each(self, positions: Sequence[int]) -> list[bytes]:
        """The contents of chunks, verified; neighbours are read together. Raises Damaged."""
        return [
            self._opened(position, piece)[1] for position, piece in zip(positions, self.stored(positions), strict=True)
        ]

    def stored(self, positions: Sequence[int]) -> list[bytes]:
        """The chunks as they are stored, not verified."""
        offsets = self.index.offsets
        pieces: list[bytes] = []
        first = 0
        while first < len(positions):
            after = first + 1
            start = int(offsets[positions[first]])
            end = int(offsets[positions[first] + 1])
            bounds = [(start, end)]
            while after < len(positions) and positions[after] == positions[after - 1] + 1 and end - start < _TOGETHER:
                following = int(offsets[positions[after] + 1])
                bounds.append((end, following))
                end = following
                after += 1
            pieces += self._pieces(start, end, bounds)
            first = after
        return pieces

    def _pieces(self, start: int, end: int, bounds: list[tuple[int, int]]) -> list[bytes]:
        try:
            data = os.pread(self._fd, end - start, start)
        except OSError as error:
            raise Damaged(f"pack {self.path.name} can't be read at byte {start}: {error.strerror}") from error
        if len(data) != end - start:
            raise Damaged(f"pack {self.path.name} became shorter")
        if len(bounds) == 1:
            return [data]
        return [data[one - start : two - start] for one, two in bounds]

    def opened(self, positions: Sequence[int]) -> list[bytes]:
        """The chunks as they are stored but for the encryption, their contents verified. Raises Damaged."""
        return [
            self._opened(position, piece)[0] for position, piece in zip(positions, self.stored(positions), strict=True)
        ]

    def _opened(self, position: int, stored: bytes) -> tuple[bytes, bytes]:
        try:
            return self.index.opened(position, stored, self._cipher, self._address_key)
        except Damaged as error:
            chunk = self.index.hashes[position].tobytes().hex()
            raise Damaged(f"pack {self.path.name}, position {position} (chunk {chunk}): {error}") from error

    def close(self) -> None:
        """Gives the descriptor back; the index stays mapped as long as somebody holds arrays of it."""
        self._closing()
