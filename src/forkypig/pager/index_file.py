"""The index of a settled snapshot on disk: HOME/layers/<id>.index.

    8 bytes   magic and version, "FKYIDX" 1 0
    4 bytes   length of the header, little-endian
    header    JSON: snapshot, parent, size_bytes, page_bytes, owners (ids; number n on disk is owners[n-1]), touched
    body      for each page a little-endian uint16: its owner's number on disk, 0 for none
    32 bytes  BLAKE2b-256 of all that stands before

It is written whole under another name, synced, and renamed: the rename is what makes a snapshot settled. The layer is
synced and in place before. Both are synced, because the frozen process that they replace is killed right afterwards,
and a snapshot that somebody keeps must outlive a power cut from then on.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from forkypig.pager.index import NO_OWNER, PAGE_BYTES, Owners, PageRun

_MAGIC = b"FKYIDX\x01\x00"
_DIGEST_BYTES = 32
_LENGTH = struct.Struct("<I")


class Damaged(Exception):
    """An index file is not whole, or of a version that we do not know."""


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """What an index file says. `owners` holds, for each page, 1 + the position in `layers`, or 0."""

    snapshot: str
    parent: str
    size_bytes: int
    layers: tuple[str, ...]
    owners: Owners
    touched: tuple[PageRun, ...] = field(default_factory=tuple)  # pages that a load asks for


def renumbered(owners: Owners, numbers: dict[int, int]) -> Owners:
    """`owners` with each number replaced by what `numbers` says; 0 stays."""
    table = np.zeros(max(numbers, default=0) + 1, np.uint16)
    table[NO_OWNER] = NO_OWNER
    for old, new in numbers.items():
        table[old] = new
    return table[owners]


def encode(index: SavedIndex) -> bytes:
    """The bytes of an index file."""
    header = {
        "snapshot": index.snapshot,
        "parent": index.parent,
        "size_bytes": index.size_bytes,
        "page_bytes": PAGE_BYTES,
        "owners": index.layers,
        "touched": index.touched,
    }
    text = json.dumps(header).encode()
    content = b"".join((_MAGIC, _LENGTH.pack(len(text)), text, index.owners.astype("<u2").tobytes()))
    return content + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def decode(data: bytes) -> SavedIndex:
    """The opposite of `encode`. Raises Damaged."""
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not content.startswith(_MAGIC):
        raise Damaged("it is no index file of this version")
    if hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() != digest:
        raise Damaged("its checksum is wrong")
    at = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack_from(content, len(_MAGIC))
    header = json.loads(content[at : at + length])
    owners = np.frombuffer(content, "<u2", offset=at + length).astype(np.uint16)
    if header["page_bytes"] != PAGE_BYTES or len(owners) != header["size_bytes"] // PAGE_BYTES:
        raise Damaged("its size is wrong")
    return SavedIndex(
        snapshot=header["snapshot"],
        parent=header["parent"],
        size_bytes=header["size_bytes"],
        layers=tuple(header["owners"]),
        owners=owners,
        touched=tuple((first, count) for first, count in header["touched"]),
    )


def write(path: Path, index: SavedIndex) -> None:
    """Writes an index file whole, or leaves what was there. Blocks on the disk. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(encode(index))
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
