"""What the other modules agree on: sizes, the references to pages, the names of hashes. No I/O.

A reference is one uint64 per page and says where the page is:

    0              a page of zeros
    bit 63 set     in a frozen process: the low bits are the number of its layer
    bit 62 set     in the base image, at the same offset (disks only)
    else           pack number << 32 | position in that pack's index
"""

import re
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from forkypig.errors import Damaged

PAGE_BYTES = 4096
REGION_PAGES = 512
REGION_BYTES = PAGE_BYTES * REGION_PAGES
HASH_BYTES = 32
MAX_CONTENT_BYTES = 1 << 16  # of one chunk: pages are 4 KiB, blocks at most 16, device state comes in pieces of 64
MAX_SECTION_BYTES = 1 << 44  # of one memory or disk; a lying size must not make us allocate without bound

ZERO = 0
FROZEN = 1 << 63
BASE = 1 << 62
MAX_PACK = (1 << 29) - 1

# In a block, and for a whole region in a manifest, where a hash would stand. No content has these as its hash.
ZERO_HASH = bytes(HASH_BYTES)
BASE_HASH = b"as in the base image".ljust(HASH_BYTES, b"\0")

# What numpy can look at: Python 3.12 has collections.abc.Buffer for it.
Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

References = npt.NDArray[np.uint64]
Hashes = npt.NDArray[np.uint8]  # of shape (n, 32)
Mask = npt.NDArray[np.bool_]

_PACK_NAME = re.compile(r"([0-9a-f]{16})\.pack")


def reference(pack: int, position: int) -> int:
    """The reference to the chunk at a position of a pack."""
    return pack << 32 | position


def frozen(layer: int) -> int:
    """The reference to a page that the frozen layer of this number holds."""
    return FROZEN | layer


def is_frozen(references: References) -> Mask:
    """Which references are to pages of frozen processes."""
    return np.asarray(references >= np.uint64(FROZEN))


def is_base(references: References) -> Mask:
    """Which references are to pages of the base image."""
    return np.asarray((references & np.uint64(BASE | FROZEN)) == BASE)


def is_packed(references: References) -> Mask:
    """Which references are to chunks of packs."""
    return np.asarray((references != 0) & (references < np.uint64(BASE)))


def layers_of(references: References) -> References:
    """The numbers of the layers; all references are frozen."""
    return references & ~np.uint64(FROZEN)


def packs_of(references: References) -> References:
    """The numbers of the packs; all references are packed."""
    return references >> np.uint64(32)


def positions_of(references: References) -> npt.NDArray[np.int64]:
    """The positions in the packs' indexes; all references are packed."""
    return (references & np.uint64(0xFFFFFFFF)).astype(np.int64)


def pack_path(directory: Path, number: int) -> Path:
    """Where the pack of this number is, below the store."""
    return directory / "packs" / f"{number:016x}.pack"


def pack_number(name: str) -> int | None:
    """The number of the pack with this file name; None when it is not that of a pack."""
    found = _PACK_NAME.fullmatch(name)
    number = int(found[1], 16) if found else 0
    return number if 0 < number <= MAX_PACK else None


def as_hashes(parts: list[bytes]) -> Hashes:
    """Hashes as an array of shape (n, 32)."""
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, HASH_BYTES)


def keys_of(hashes: Hashes) -> References:
    """The first 8 bytes of each hash as big-endian numbers: what indexes are sorted by."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def as_pages(buffer: Buffer) -> npt.NDArray[np.uint64]:
    """A buffer of whole pages as an array of shape (pages, 512)."""
    flat = np.frombuffer(buffer, np.uint64)
    return flat.reshape(-1, PAGE_BYTES // 8)


def check_size(size_bytes: int, what: str) -> None:
    """Raises Damaged when a section can't have this size."""
    if not 0 <= size_bytes <= MAX_SECTION_BYTES or size_bytes % PAGE_BYTES:
        raise Damaged(f"{what} says that it is of {size_bytes} bytes, which can't be")
