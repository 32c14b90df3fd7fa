"""From content to what is stored and back: BLAKE3 addresses, zstd frames. Everything that is decoded is verified."""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from forkypig.chunks.format import MAX_CONTENT_BYTES
from forkypig.errors import Damaged

# Packing is as fast as this is: -1 takes two thirds of the time of 1, for 14 % more room (decision 0015).
LEVEL = -1
_local = threading.local()  # zstd's contexts cost more than a page to make, and belong to one thread at a time


def hash_each(buffer: memoryview, piece_bytes: int, key: bytes | None) -> list[bytes]:
    """The addresses of the pieces of a buffer."""
    starts = range(0, len(buffer), piece_bytes)
    if key is None:
        return [blake3(buffer[at : at + piece_bytes]).digest() for at in starts]
    return [blake3(buffer[at : at + piece_bytes], key=key).digest() for at in starts]


def address(content: bytes | memoryview, key: bytes | None) -> bytes:
    """The address of one content."""
    return blake3(content).digest() if key is None else blake3(content, key=key).digest()


def compress_each(content: memoryview, lengths: npt.NDArray[np.int64]) -> tuple[list[bytes], list[bool]]:
    """What to store for each of the pieces of `lengths` that `content` consists of: a zstd frame, or the piece itself
    where that is not longer (True in the second list). Without the interpreter's lock but for the last step."""
    compressor: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    segments = np.empty((len(lengths), 2), np.uint64)
    segments[:, 1] = lengths
    segments[:, 0] = np.cumsum(lengths) - lengths
    frames = compressor.multi_compress_to_buffer(zstandard.BufferWithSegments(content, segments.tobytes()), threads=0)
    pieces = [frame.tobytes() for frame in frames]  # type: ignore[attr-defined]
    starts = segments[:, 0].tolist()
    raw = [len(piece) >= length for piece, length in zip(pieces, lengths.tolist(), strict=True)]
    for number in np.flatnonzero(raw).tolist():
        pieces[number] = content[starts[number] : starts[number] + int(lengths[number])].tobytes()
    return pieces, raw


def decompress(frame: bytes, length: int) -> bytes:
    """The content of a frame, which must be of `length` bytes. Raises Damaged. Never allocates more than `length`."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        # Frames of at most 64 KiB of content have no larger window.
        decompressor = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_CONTENT_BYTES)
    try:
        if zstandard.frame_content_size(frame) != length:  # zstandard allocates what the frame's header says
            raise Damaged("a chunk's frame says another length than the index")
        content = decompressor.decompress(frame, max_output_size=length)
    except zstandard.ZstdError as error:
        raise Damaged(f"a chunk can't be decompressed: {error}") from error
    if len(content) != length:
        raise Damaged("a chunk is of another length than the index says")
    return content


def checked(content: bytes, expected: bytes, key: bytes | None) -> bytes:
    """`content`, when its address is `expected`; else raises Damaged."""
    if address(content, key) != expected:
        raise Damaged(f"chunk {expected.hex()} is damaged: its content has another hash")
    return content


def pieces_of(content: bytes, piece_bytes: int = MAX_CONTENT_BYTES) -> Sequence[bytes]:
    """A long content as pieces that fit a chunk each."""
    return [content[at : at + piece_bytes] for at in range(0, len(content), piece_bytes)]
