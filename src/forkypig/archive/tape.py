"""The tar file of an export, as narrow as can be: plain files in a fixed order. `tar -tvf` shows it.

Reading takes names to compare them and for nothing else. Links, devices, sparse files, long names and extension
headers are refused: none of them has a place in an export.
"""

import io
import tarfile
from typing import IO

from forkypig.errors import Damaged

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_PIECE = 1 << 20


def header(name: str, size: int, time_s: int = 0) -> bytes:
    """What stands before a file's content."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, time_s, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)  # sizes over 8 GiB are in base 256


def padding(size: int) -> bytes:
    """What stands after it."""
    return bytes(-size % BLOCK)


def whole(name: str, content: bytes) -> bytes:
    """A small file with all around it."""
    return b"".join((header(name, len(content)), content, padding(len(content))))


class Reader:
    """Reads one, from anything that has `read`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = self._padding = 0
        self._next: tuple[str, int] | None = None
        self.done_bytes = 0  # of the whole file

    def peek(self) -> str:
        """The name of the next file; "" at the end. Raises Damaged."""
        if self._next is None:
            assert self._left == 0
            self._exactly(self._padding)
            self._padding = 0
            self._next = self._parse(self._exactly(BLOCK))
        return self._next[0]

    def open(self, name: str, most: int) -> int:
        """Begins the next file, which must be called so and have at most so many bytes; returns how many. Raises
        Damaged."""
        if self.peek() != name:
            raise Damaged(f"this export is damaged: «{name}» is expected and «{self.peek()[:80]}» is there")
        assert self._next is not None
        size = self._next[1]
        if size > most:
            raise Damaged(f"this export is damaged: «{name}» has {size} bytes, and can have {most} at most")
        self._left, self._padding, self._next = size, -size % BLOCK, None
        return size

    def read(self, size: int) -> bytes:
        """So many bytes of the file that was begun. Raises Damaged."""
        if size > self._left:
            raise Damaged("this export is damaged: a file in it is shorter than its index says")
        self._left -= size
        return self._exactly(size)

    def content(self, name: str, most: int) -> bytes:
        """A small file, whole. Raises Damaged."""
        return self.read(self.open(name, most))

    def skip(self) -> None:
        """The rest of the file that was begun."""
        while self._left:
            self.read(min(self._left, _PIECE))

    def finish(self) -> None:
        """The file must end here."""
        if self._left:
            raise Damaged("this export is damaged: a file in it is longer than its index says")
        if self.peek():
            raise Damaged(f"this export is damaged: it goes on with «{self.peek()[:80]}» after its end")

    def _exactly(self, size: int) -> bytes:
        buffer = io.BytesIO()
        while (missing := size - buffer.tell()) > 0:
            piece = self._stream.read(min(missing, _PIECE))
            if not piece:
                raise Damaged("this export is cut off: it ends before its end")
            buffer.write(piece)
        self.done_bytes += size
        return buffer.getvalue()

    def _parse(self, block: bytes) -> tuple[str, int]:
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return "", 0
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise Damaged(f"this is not an export of a snapshot, or it is damaged: {error}") from error
        if entry.type != tarfile.REGTYPE or not 0 <= entry.size < 1 << 62 or not entry.name:
            raise Damaged(f"this export has a «{entry.name[:80]}» that is no plain file: refused")
        return entry.name, entry.size
