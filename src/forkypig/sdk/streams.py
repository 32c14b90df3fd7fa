"""Files of a machine as streams of bytes, for whoever passes them on: nothing touches the disk of this side.

A directory is a tar archive, as the Agent service has it; a file is its content.
"""

import asyncio
import contextlib
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

from forkypig import errors
from forkypig.sdk.transfer import Threaded, guest_path

if TYPE_CHECKING:
    from forkypig.sdk.machine import Machine

_AHEAD = 4  # pieces that lie between the thread that unpacks and whoever takes them


async def archive_of(machine: "Machine", path: str) -> AsyncGenerator[bytes, None]:
    """A file or a tree as a tar archive whose top entry is named as the path's last part.

    Raises NotFound, InvalidRequest (no absolute path)."""
    call = machine.transfer.download_archive(guest_path(path))
    async with contextlib.aclosing(call) as pieces:
        async for piece in pieces:
            yield piece


async def unpack_archive(machine: "Machine", directory: str, pieces: AsyncIterator[bytes]) -> tuple[int, int]:
    """Unpacks a tar archive in a directory of the machine; returns how many files and bytes it had.

    Raises NotFound, InvalidRequest (no archive, no absolute path)."""
    made = await machine.transfer.upload_archive(guest_path(directory), _checked(pieces))
    return made.files, made.bytes


async def _checked(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of an archive, once its first header is one: the guest would say no more than «invalid header»."""
    head, checked = b"", False
    async for piece in pieces:
        if checked:
            yield piece
            continue
        head += piece
        if len(head) >= tarfile.BLOCKSIZE:
            _check_header(head[: tarfile.BLOCKSIZE])
            checked = True
            yield head
    if not checked:
        _check_header(head)


def _check_header(block: bytes) -> None:
    if block == bytes(tarfile.BLOCKSIZE):
        return  # the end of an empty archive
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise errors.InvalidRequest("what was sent is no tar archive: send one that is not compressed") from error


async def content_of(machine: "Machine", path: str) -> AsyncGenerator[bytes, None]:
    """The content of one file. Raises NotFound, and InvalidRequest for a directory."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)

    async def fetch() -> None:
        try:
            await machine.download_into(path, _Queued(pieces))  # type: ignore[arg-type]
        finally:
            await pieces.put(None)

    fetching = asyncio.create_task(fetch())
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await fetching
    finally:
        fetching.cancel()
        while not fetching.done():  # its thread may wait for room
            with contextlib.suppress(asyncio.QueueEmpty):
                pieces.get_nowait()
            await asyncio.wait([fetching], timeout=0.01)
        if not fetching.cancelled():
            fetching.exception()


async def write_content(machine: "Machine", path: str, size: int, mode: int, pieces: AsyncIterator[bytes]) -> None:
    """Makes or replaces one file from `size` bytes. Raises InvalidRequest where fewer come."""
    await machine.upload_from(_Taken(pieces), size, path, mode=mode)  # type: ignore[arg-type]


class _Queued(Threaded):
    """A file for the unpacking thread whose pieces go into a queue of the loop."""

    def __init__(self, pieces: asyncio.Queue[bytes | None]) -> None:
        super().__init__()
        self._pieces = pieces

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.wait(lambda: self._pieces.put(bytes(data)))
        return len(data)


class _Taken(Threaded):
    """A file for the packing thread whose bytes come from the loop."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        super().__init__()
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        gathered = bytearray()
        while len(gathered) < size:
            self._rest = self._rest or self.wait(self._next)
            if not self._rest:
                break
            take = size - len(gathered)
            gathered += self._rest[:take]
            self._rest = self._rest[take:]
        return bytes(gathered)

    async def _next(self) -> bytes:
        async for piece in self._pieces:
            if piece:
                return piece
        return b""
