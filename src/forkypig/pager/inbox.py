"""Requests that the kernel has handed over and nobody has answered yet, in memory that outlives whoever was to.

The kernel hands each request over once. A holder that dies with one would leave the process that asked waiting for
ever; Linux 6.9 can send such requests again (FUSE_NOTIFY_RESEND), Debian 12's and Ubuntu 24.04's kernels can't. So the
kernel writes every request into memory of the keeper's, and there is no moment at which only the holder knows of it:

    current     the request that is being read or answered; its length is 0 when it is
    waiting     reads that can't be answered at once, noted before the next request is read: a table of fixed places

A successor answers what it finds. Some of that may have been answered a moment before the death: the kernel refuses the
second answer (ENOENT), since no two requests of a connection have the same number.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import structlog

log = structlog.get_logger()

# What the kernel wants to be able to write: FUSE_MIN_READ_BUFFER, and a write of the 4 KiB that we allow with its head.
REQUEST_BYTES = 1 << 14
_LENGTH = struct.Struct("<I")  # a request's first field
_PLACE = struct.Struct("<QQQQ")  # unique, node, offset, length; unique 0: it is free
_UNIQUE = struct.Struct("<Q")
PLACES = 1 << 16  # more reads at once than a host has processes; one more is not noted
INBOX_BYTES = REQUEST_BYTES + PLACES * _PLACE.size


class WaitingRead(NamedTuple):
    """A read that waits for its answer."""

    unique: int
    node: int
    offset: int
    length: int


def new_inbox() -> int:
    """A descriptor of an empty one."""
    fd = os.memfd_create("forky-inbox")
    os.ftruncate(fd, INBOX_BYTES)
    return fd


class Inbox:
    """One connection's, mapped."""

    def __init__(self, fd: int) -> None:
        self._memory = memoryview(mmap.mmap(fd, INBOX_BYTES))
        self.current = self._memory[:REQUEST_BYTES]  # where the kernel writes
        self._free: list[int] = []
        self._places: dict[int, int] = {}  # by unique
        for at in range(REQUEST_BYTES, INBOX_BYTES, _PLACE.size):
            (unique,) = _UNIQUE.unpack_from(self._memory, at)
            if unique:
                self._places[unique] = at
            else:
                self._free.append(at)
        self._free.reverse()

    def left(self) -> memoryview | None:
        """The request that a predecessor had read and had not done with."""
        (length,) = _LENGTH.unpack_from(self.current)
        return self.current[:length] if length else None

    def left_waiting(self) -> Iterator[WaitingRead]:
        """The reads that a predecessor has not answered."""
        for at in self._places.values():
            yield WaitingRead(*_PLACE.unpack_from(self._memory, at))

    def done(self) -> None:
        """The current request is answered, or noted as waiting."""
        _LENGTH.pack_into(self.current, 0, 0)

    def waits(self, read: WaitingRead) -> None:
        """Notes a read that is answered later; the same again is fine."""
        if read.unique in self._places:
            return
        if not self._free:
            log.error("too many reads wait to be noted: should this process die, one waits for ever")
            return
        at = self._free.pop()
        _PLACE.pack_into(self._memory, at, 0, *read[1:])
        _UNIQUE.pack_into(self._memory, at, read.unique)  # last: from here on it counts
        self._places[read.unique] = at

    def answered(self, unique: int) -> None:
        """A read that waited does so no more."""
        if (at := self._places.pop(unique, None)) is not None:
            _UNIQUE.pack_into(self._memory, at, 0)
            self._free.append(at)
