"""Packs a disk: what its layers hold goes to the store, what is as in the base image is named so. For the packer."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from forkypig.chunks import manifest_file
from forkypig.chunks.format import BASE, PAGE_BYTES, Mask, References, as_pages
from forkypig.chunks.section import Section, make_section
from forkypig.chunks.store import Store
from forkypig.chunks.writer import Writer
from forkypig.errors import InvalidRequest
from forkypig.pager.disk_stack import PageRange, flattened, page_ranges
from forkypig.pager.order import Disk

_BATCH_PAGES = 1024


class DiskPacker:
    """One disk, which does not change meanwhile."""

    def __init__(self, disk: Disk) -> None:
        """Raises OSError when a layer or the base can't be opened."""
        self._disk = disk
        self._pieces = flattened([layer.extents for layer in disk.layers], disk.size_bytes)
        self.bytes = sum(piece.end - piece.start for piece in self._pieces)
        with contextlib.ExitStack() as opened:
            self._layers = [_open(layer.path, opened) for layer in disk.layers]
            self._base = _open(disk.base.path, opened)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Gives the descriptors back."""
        self._opened.close()

    def pack(self, store: Store, writer: Writer, done: Callable[[int], None]) -> Section:
        """Adds it to the store. `done` is called with numbers of bytes. Raises ForkyError, OSError."""
        references = self._below(store)
        for part in page_ranges(self._pieces, _BATCH_PAGES):
            content = self._content(store, references, part)
            where = slice(part.first, part.first + part.pages)
            references[where] = writer.add(content)
            same = self._as_in_base(part, content)
            references[where][same] = BASE
            done(sum(piece.end - piece.start for piece in part.pieces))
        return make_section(writer, references, self._disk.size_bytes)

    def _below(self, store: Store) -> References:
        """What is seen where no layer holds anything."""
        pages = self._disk.size_bytes // PAGE_BYTES
        if self._disk.below is None:
            references = np.zeros(pages, np.uint64)
            references[: -(-os.fstat(self._base).st_size // PAGE_BYTES)] = BASE
            return references
        below = manifest_file.load(store, self._disk.below)
        if below.base is not None and below.base.sha256 != self._disk.base.sha256:
            raise InvalidRequest(f"{self._disk.below} stands on another image ({below.base.id}): it can't be below")
        if below.disk.size_bytes != self._disk.size_bytes:
            raise InvalidRequest(f"the disk of {self._disk.below} is of another size: it can't be below")
        return below.disk.expand(store)

    def _content(self, store: Store, references: References, part: PageRange) -> bytearray:
        """The pages of a range as the guest sees them."""
        content = bytearray(part.pages * PAGE_BYTES)
        if not part.is_covered:
            self._read_below(store, references, part, content)
        start = part.first * PAGE_BYTES
        view = memoryview(content)
        for piece in part.pieces:
            into = view[piece.start - start : piece.end - start]
            if piece.file_offset is None:
                into[:] = bytes(len(into))
            else:
                # An overlay's last cluster may end before its cluster does: what is not there reads as zeros.
                count = os.preadv(self._layers[piece.layer], [into], piece.file_offset)
                into[count:] = bytes(len(into) - count)
        return content

    def _read_below(self, store: Store, references: References, part: PageRange, content: bytearray) -> None:
        """Fills in what lies below a range that layers cover only in part; QEMU's clusters never do."""
        below = references[part.first : part.first + part.pages].tolist()
        stored = store.read([0 if reference == BASE else reference for reference in below])
        for number, (reference, page) in enumerate(zip(below, stored, strict=True)):
            if reference == BASE:
                read = os.pread(self._base, PAGE_BYTES, (part.first + number) * PAGE_BYTES)
                content[number * PAGE_BYTES : number * PAGE_BYTES + len(read)] = read
            else:
                content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page

    def _as_in_base(self, part: PageRange, content: bytearray) -> Mask:
        """Which pages are as the base image has them, and within it."""
        base = bytearray(len(content))
        count = os.preadv(self._base, [base], part.first * PAGE_BYTES)
        same: Mask = (as_pages(content) == as_pages(base)).all(axis=1)
        same[-(-count // PAGE_BYTES) :] = False
        return same


def _open(path: Path, opened: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd
