"""Reading files: frozen processes are read here and now, everything else is asked of the reader.

What waits never holds a descriptor or a region: frozen pages are read before the first wait, so that a layer may be
packed and closed meanwhile.
"""

import asyncio
import errno
from collections.abc import Sequence

from forkypig.chunks.format import BASE, FROZEN, PAGE_BYTES
from forkypig.pager.index import NotMade, PageIndex, PageRun
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.served import FileKind, ServedFile

# 32 MiB of a file: an answer of 64 KiB, that keeps faults waiting for less than a millisecond.
_REGIONS_A_STEP = 16


class Content:
    """The content of served files."""

    def __init__(self, layers: FrozenLayers, reader: ReaderLink) -> None:
        self._layers, self._reader = layers, reader
        self._making: dict[tuple[int, int], asyncio.Future[None]] = {}

    def read_now(self, file: ServedFile, offset: int, length: int) -> bytes | bytearray | None:
        """As `read`, when frozen processes have all of it; else None. Without a task a fault is answered sooner."""
        if file.kind is not FileKind.MEMORY or offset % PAGE_BYTES or length % PAGE_BYTES:
            return None
        length = min(length, file.size_bytes - offset)
        try:
            references = file.index.references(offset // PAGE_BYTES, length // PAGE_BYTES)
        except NotMade:
            return None
        if length <= 0 or any(0 < reference < FROZEN for reference in references):
            return None
        frozen, _ = self._frozen(offset // PAGE_BYTES, references)
        return (
            _assembled(frozen, bytearray(length)) if len(frozen) != 1 or len(frozen[0][1]) != length else frozen[0][1]
        )

    async def read(self, file: ServedFile, offset: int, length: int) -> bytes | bytearray:
        """Up to `length` bytes, fewer at the file's end. Raises OSError (EIO)."""
        length = min(length, file.size_bytes - offset)
        if length <= 0:
            return b""
        if file.kind is FileKind.DEVICES:  # it is small, and not stored in pages
            return (await self._reader.devices(file.snapshot))[offset : offset + length]
        first = offset // PAGE_BYTES
        count = -(-(offset + length) // PAGE_BYTES) - first
        try:
            data = await self._pages(file, first, await self._references(file.index, first, count))
        except OSError:
            if file.index.stored_as is None:
                raise
            # A collection may have moved chunks while their places were on the way to us.
            file.index.drop()
            data = await self._pages(file, first, await self._references(file.index, first, count))
        skip = offset - first * PAGE_BYTES
        return data if skip == 0 and len(data) == length else data[skip : skip + length]

    async def read_runs(self, file: ServedFile, runs: Sequence[PageRun]) -> list[tuple[int, bytearray]]:
        """Offset and content of runs of pages, by one question to the reader. Raises OSError."""
        read: list[tuple[int, bytearray]] = []
        asked: list[int] = []
        for first, count in runs:
            frozen, wanted = self._frozen(first, await self._references(file.index, first, count))
            read.append((first * PAGE_BYTES, _assembled(frozen, bytearray(count * PAGE_BYTES))))
            asked += wanted
        if any(asked):
            content = memoryview(await self._reader.read(file.base, asked))
            at = 0
            for (_, part), (_, count) in zip(read, runs, strict=True):
                for page in range(count):
                    if asked[at + page]:
                        start = page * PAGE_BYTES
                        part[start : start + PAGE_BYTES] = content[at * PAGE_BYTES + start :][:PAGE_BYTES]
                at += count
        return read

    async def will_need(self, file: ServedFile, runs: Sequence[PageRun]) -> None:
        """These pages are read soon, and may lie on a disk. Raises OSError."""
        references = [one for first, count in runs for one in await self._references(file.index, first, count)]
        await self._reader.will_need([one for one in references if not one & (FROZEN | BASE)])

    async def make_all(self, index: PageIndex) -> None:
        """Reads the whole index of a stored file. Raises OSError."""
        for position in range(index.regions):
            if not index.is_made(position):
                await self._make(index, position)

    async def _references(self, index: PageIndex, first: int, count: int) -> list[int]:
        while True:
            try:
                return index.references(first, count)
            except NotMade as missing:
                await self._make(missing.index, missing.position)

    async def _make(self, index: PageIndex, position: int) -> None:
        """Reads the regions around `position` from the store, once for all who wait. Raises OSError."""
        step = position - position % _REGIONS_A_STEP
        key = (id(index), step)  # the task holds the index
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = asyncio.ensure_future(self._fill(index, step))
            making.add_done_callback(lambda _: self._making.pop(key, None))
        await asyncio.shield(making)

    async def _fill(self, index: PageIndex, step: int) -> None:
        if index.stored_as is None:
            raise OSError(errno.EIO, "the index of a frozen memory can't be made: its process has ended")
        count = min(_REGIONS_A_STEP, index.regions - step)
        index.fill(step, await self._reader.expand(*index.stored_as, step, count))

    async def _pages(self, file: ServedFile, first: int, references: list[int]) -> bytearray:
        frozen, asked = self._frozen(first, references)
        if any(asked):
            return _assembled(frozen, await self._reader.read(file.base, asked))
        return _assembled(frozen, bytearray(len(references) * PAGE_BYTES))

    def _frozen(self, first: int, references: list[int]) -> tuple[list[tuple[int, bytes]], list[int]]:
        """What frozen processes hold (where in the answer, content), and for all pages what to ask of the reader: 0 for
        nothing."""
        frozen: list[tuple[int, bytes]] = []
        asked = [0] * len(references)
        at = 0
        while at < len(references):
            reference = references[at]
            end = at + 1
            if reference & FROZEN:
                while end < len(references) and references[end] == reference:
                    end += 1
                layer = self._layers[reference ^ FROZEN]
                frozen.append((at * PAGE_BYTES, layer.read((first + at) * PAGE_BYTES, (end - at) * PAGE_BYTES)))
            elif reference:
                asked[at] = reference | (first + at) if reference == BASE else reference
            at = end
        return frozen, asked


def _assembled(frozen: list[tuple[int, bytes]], whole: bytearray) -> bytearray:
    for start, data in frozen:
        whole[start : start + len(data)] = data
    return whole
