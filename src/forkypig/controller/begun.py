"""Calls that have begun and not ended, on disk: what a controller was at when it was killed, so that its audit log can
tell of a change that may have happened.

A line for each beginning, a number for each end, in a file that is emptied whenever nothing is under way: the audit log
itself keeps one line for each call.
"""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LARGE_BYTES = 64 << 10  # emptying costs more than a line


@dataclass(slots=True)
class Begun:
    """The file of one controller."""

    fd: int
    left: Sequence[dict[str, Any]]  # what the one before was at, in the order in which it was begun
    _open: dict[int, bytes]
    _next: int = 0
    _bytes: int = 0

    @classmethod
    def at(cls, path: Path) -> "Begun":
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(fd).st_size
        return cls(fd, _left(os.pread(fd, size, 0)), {}, _bytes=size)

    def forget_left(self) -> None:
        """What was left is in the audit log now."""
        self.left = ()
        self._empty()

    def begin(self, entry: Any) -> int:
        """Notes a dataclass of the call, before anything is done; its number, for `end`. Raises OSError."""
        self._next += 1
        line = json.dumps({"n": self._next, **asdict(entry)}).encode() + b"\n"
        self._write(line)
        self._open[self._next] = line
        return self._next

    def end(self, number: int) -> None:
        """Its line in the audit log is written. Raises OSError."""
        if self._open.pop(number, None) is None:
            return
        self._write(b"%d\n" % number)
        if self._bytes > _LARGE_BYTES and not self._open:
            self._empty()

    def close(self) -> None:
        os.close(self.fd)

    def _write(self, line: bytes) -> None:
        written = os.write(self.fd, line)
        self._bytes += written
        if written < len(line):  # no room: what is there of it is no line, nor may the next one be part of it
            os.ftruncate(self.fd, self._bytes - written)
            self._bytes -= written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _empty(self) -> None:
        os.ftruncate(self.fd, 0)
        self._bytes = 0


def _left(content: bytes) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in content.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # torn by a power cut
        if isinstance(said, int):
            found.pop(said, None)
        elif isinstance(said, dict) and isinstance(number := said.pop("n", None), int):
            found[number] = said
    return list(found.values())
