"""Reading files: frozen processes are read here and now, everything else is asked of the reader.

What waits never holds a descriptor or a region: frozen pages are read before the first wait, so that a layer may be
packed and closed meanwhile.
"""

import asyncio
import errno

from forkypig.chunks.format import BASE, FROZEN, PAGE_BYTES
from forkypig.pager.index import NotMade, PageIndex
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

    async def _pages(self, file: ServedFile, first: int, references: list[int]) -> bytes | bytearray:
        frozen: list[tuple[int, bytes]] = []  # where in the answer, what
        asked: list[int] = []
        at, stored = 0, False
        while at < len(references):
            reference = references[at]
            if reference & FROZEN:
                end = at + 1
                while end < len(references) and references[end] == reference:
                    end += 1
                data = self._layers[reference ^ FROZEN].read((first + at) * PAGE_BYTES, (end - at) * PAGE_BYTES)
                if end - at == len(references):
                    return data
                frozen.append((at * PAGE_BYTES, data))
                asked += [0] * (end - at)
                at = end
                continue
            if reference:
                stored = True
                if reference == BASE:
                    reference |= first + at
            asked.append(reference)
            at += 1
        if stored:
            whole = await self._reader.read(file.base, asked)
        else:
            whole = bytearray(len(references) * PAGE_BYTES)
        for start, data in frozen:
            whole[start : start + len(data)] = data
        return whole
