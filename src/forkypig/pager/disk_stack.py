"""The pages of a disk that a stack of overlays holds: which bytes of which file, the upper layer before the lower.

For the packer. Decisions only: it says what to read, and reads nothing.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from forkypig.chunks.format import PAGE_BYTES
from forkypig.pager.order import Extent


class Piece(NamedTuple):
    """A range of the disk, in bytes, and who holds it."""

    start: int
    end: int
    layer: int  # number of the layer, 0 is the top
    file_offset: int | None  # of `start` in the layer's file; None: it reads as zeros


def flattened(layers: Sequence[Sequence[Extent]], size_bytes: int) -> list[Piece]:
    """What is seen of the layers from above: disjoint, in ascending order, within the disk."""
    seen: list[Piece] = []
    for number, extents in enumerate(layers):
        below: list[Piece] = []
        starts = [piece.start for piece in seen]
        for extent in extents:
            start, end = extent.guest_offset, min(extent.guest_offset + extent.length, size_bytes)
            at = bisect_left(starts, start)
            if at and seen[at - 1].end > start:
                start = seen[at - 1].end
            while start < end:
                until = min(end, seen[at].start) if at < len(seen) else end
                if start < until:
                    skipped = start - extent.guest_offset
                    offset = None if extent.file_offset is None else extent.file_offset + skipped
                    below.append(Piece(start, until, number, offset))
                start = max(start, seen[at].end) if at < len(seen) else end
                at += 1
        seen = sorted(seen + below)
    return seen


class PageRange(NamedTuple):
    """Whole pages that the layers touch, and the pieces that lie in them."""

    first: int
    pages: int
    pieces: list[Piece]

    @property
    def is_covered(self) -> bool:
        """Whether the pieces leave nothing of it to what is below."""
        covered = sum(piece.end - piece.start for piece in self.pieces)
        return covered == self.pages * PAGE_BYTES


def page_ranges(pieces: Sequence[Piece], most_pages: int) -> Iterator[PageRange]:
    """The pages that pieces touch, in ranges of at most `most_pages` without gaps. Pieces are cut at their borders."""
    first, pages, inside = 0, 0, list[Piece]()
    for piece in pieces:
        start = piece.start
        while start < piece.end:
            page = start // PAGE_BYTES
            if pages and (page > first + pages or page >= first + most_pages):
                yield PageRange(first, pages, inside)
                first, pages, inside = page, 0, []
            elif not pages:
                first = page
            end = min(piece.end, (first + most_pages) * PAGE_BYTES)
            offset = None if piece.file_offset is None else piece.file_offset + start - piece.start
            inside.append(Piece(start, end, piece.layer, offset))
            pages = -(-end // PAGE_BYTES) - first
            start = end
    if pages:
        yield PageRange(first, pages, inside)
