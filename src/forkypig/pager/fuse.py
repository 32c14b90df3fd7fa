"""The FUSE protocol, as far as a read-only file system of few files needs it, on a descriptor of /dev/fuse.

Ours and not libfuse's for one reason: libfuse answers nothing before it has seen INIT, so a new process can't go on
with the descriptor of one that died. This loop can: it keeps no state of the connection but what is in its inbox, where
it finds what the dead one had read and not answered.

Source: include/uapi/linux/fuse.h. Numbers are little-endian, as the machine's; we run on no other.
"""

import asyncio
import errno
import os
import stat
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from forkypig.pager.inbox import Inbox, WaitingRead
from forkypig.pager.latency import Latency

log = structlog.get_logger()

ROOT = 1
_IN = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, extensions
_OUT = struct.Struct("<IiQ")  # length, -errno or code of a notification, unique
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")  # node, generation, validity of name and attributes
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_READ_IN = struct.Struct("<QQI")
_STATFS = struct.Struct("<5Q4I24x")

_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS_CODE = 1, 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
_INTERRUPT, _DESTROY, _BATCH_FORGET = 36, 38, 42
_NOT_ANSWERED = (_FORGET, _BATCH_FORGET, _INTERRUPT)
_NOTIFY_INVAL_ENTRY, _NOTIFY_STORE = 3, 4
_KEEP_CACHE = 2
_VERSION = 7, 31
# Reading in parallel, large writes (refused all the same), look-ups in parallel, long requests.
_FLAGS = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22
_MAX_PAGES = 32  # of a request: 128 KiB
# Reads of snapshots that are not bound yet are pending. With the kernel's 12 background requests a dozen of them would
# hold up the read-ahead of every other snapshot, and so the machine that they wait for.
_MAX_BACKGROUND = 65535
_FOREVER_S = 86_400
_FATTR_MODE, _FATTR_UID, _FATTR_GID, _FATTR_SIZE = 1, 2, 4, 8
_AT_ONCE = 16  # after so many requests in one go the event loop's other work has its turn


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of a node."""

    node: int
    mode: int
    size: int


class Operations(Protocol):
    """The file system. All raise OSError, whose errno the process sees that asked."""

    def attributes(self, node: int) -> Attributes: ...
    def lookup(self, directory: int, name: str) -> Attributes: ...
    def entries(self, directory: int) -> Iterable[tuple[str, int]]: ...
    def opened(self, node: int, *, to_write: bool) -> None: ...
    def released(self, node: int) -> None: ...
    def read_now(self, node: int, offset: int, length: int) -> bytes | bytearray | None:
        """None when it has to wait."""

    async def read(self, node: int, offset: int, length: int) -> bytes | bytearray: ...


class Connection:
    """One mount. The descriptor is not blocking."""

    def __init__(self, fd: int, operations: Operations, inbox: Inbox) -> None:
        self.ended = asyncio.Event()  # it was unmounted
        self.latency = Latency()
        self._fd, self._operations, self._inbox = fd, operations, inbox
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner = os.geteuid(), os.getegid()

    def start(self) -> None:
        """Answers from now on."""
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def take_over(self) -> None:
        """Answers what a predecessor of ours left unanswered."""
        for read in list(self._inbox.left_waiting()):
            self._later(read)
        if (left := self._inbox.left()) is not None:
            self._request(left)
            self._inbox.done()

    async def close(self) -> None:
        """Ends the loop; requests that wait are not answered."""
        asyncio.get_running_loop().remove_reader(self._fd)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- notifications: for threads of their own, since they wait for locks that requests hold which we must answer ----

    def store(self, node: int, offset: int, data: bytes | bytearray) -> None:
        """Puts data into the page cache. Raises OSError: ENOENT when the kernel does not know the node."""
        header = _OUT.pack(_OUT.size + 24 + len(data), _NOTIFY_STORE, 0)
        os.writev(self._fd, [header, struct.pack("<QQII", node, offset, len(data), 0), data])

    def forget_name(self, directory: int, name: str) -> None:
        """Drops a name that the kernel may have cached. Raises OSError: ENOENT when it has not."""
        text = name.encode() + b"\0"
        header = _OUT.pack(_OUT.size + 16 + len(text), _NOTIFY_INVAL_ENTRY, 0)
        os.writev(self._fd, [header, struct.pack("<QII", directory, len(text) - 1, 0), text])

    # -- requests ------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                length = os.readv(self._fd, [self._inbox.current])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # it was interrupted before we had it
                    continue
                if error.errno != errno.ENODEV:
                    log.error("reading requests failed", error=str(error))
                asyncio.get_running_loop().remove_reader(self._fd)
                self.ended.set()
                return
            self._request(self._inbox.current[:length])
            self._inbox.done()

    def _request(self, request: memoryview) -> None:
        _, code, unique, node, *_ = _IN.unpack_from(request)
        if code in _NOT_ANSWERED:
            return
        try:
            if code == _READ:
                began = time.perf_counter()
                _, offset, length = _READ_IN.unpack_from(request, _IN.size)
                data = self._operations.read_now(node, offset, length)
                if data is None:
                    self._later(WaitingRead(unique, node, offset, length))
                else:
                    self._reply(unique, data)
                    self.latency.add(time.perf_counter() - began, len(data))
                return
            self._reply(unique, self._answer(code, node, bytes(request[_IN.size :])))
        except OSError as error:
            self._reply(unique, b"", error.errno or errno.EIO)
        except Exception:  # the edge of a request: the file system must not end
            log.exception("request failed", opcode=code, node=node)
            self._reply(unique, b"", errno.EIO)

    def _later(self, read: WaitingRead) -> None:
        self._inbox.waits(read)
        task = asyncio.get_running_loop().create_task(self._read(read))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, read: WaitingRead) -> None:
        began, size = time.perf_counter(), 0
        try:
            data = await self._operations.read(read.node, read.offset, read.length)
            size = len(data)
            self._reply(read.unique, data)
        except OSError as error:
            self._reply(read.unique, b"", error.errno or errno.EIO)
        except Exception:  # the edge of a request
            log.exception("read failed", node=read.node, offset=read.offset)
            self._reply(read.unique, b"", errno.EIO)
        self._inbox.answered(read.unique)
        self.latency.add(time.perf_counter() - began, size)

    def _reply(self, unique: int, data: bytes | bytearray, code: int = 0) -> None:
        try:
            os.writev(self._fd, [_OUT.pack(_OUT.size + len(data), -code, unique), data])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                log.error("answer refused", error=str(error), length=len(data))

    def _answer(self, code: int, node: int, body: bytes) -> bytes:
        match code:
            case _ if code == _LOOKUP:
                return self._entry(self._operations.lookup(node, os.fsdecode(body.split(b"\0", 1)[0])))
            case _ if code == _GETATTR:
                return self._attributes(self._operations.attributes(node))
            case _ if code == _SETATTR:
                return self._attributes(self._unchanged(node, body))
            case _ if code == _OPEN:
                (flags,) = struct.unpack_from("<I", body)
                self._operations.opened(node, to_write=flags & os.O_ACCMODE == os.O_RDWR)
                return struct.pack("<QII", node, _KEEP_CACHE, 0)
            case _ if code == _OPENDIR:
                self._operations.attributes(node)
                return struct.pack("<QII", node, 0, 0)
            case _ if code == _RELEASE:
                self._operations.released(node)
            case _ if code == _READDIR:
                return self._directory(node, body)
            case _ if code == _WRITE:
                raise OSError(errno.EROFS, "snapshots don't change")
            case _ if code == _STATFS_CODE:
                return _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
            case _ if code == _INIT:
                return _init(body)
            case _ if code in (_RELEASEDIR, _FSYNC, _FLUSH, _DESTROY):
                pass
            case _:
                raise OSError(errno.ENOSYS, "not a thing that snapshots do")
        return b""

    def _unchanged(self, node: int, body: bytes) -> Attributes:
        """Times may be «set»; nothing else may be."""
        now = self._operations.attributes(node)
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if (valid & _FATTR_SIZE and size != now.size) or valid & (_FATTR_MODE | _FATTR_UID | _FATTR_GID):
            raise OSError(errno.EROFS, "snapshots don't change")
        return now

    def _packed(self, of: Attributes) -> bytes:
        links = 2 if stat.S_ISDIR(of.mode) else 1
        return _ATTRIBUTES.pack(
            *(of.node, of.size, -(-of.size // 512), 0, 0, 0, 0, 0, 0), of.mode, links, *self._owner, 0, 4096, 0
        )

    def _entry(self, of: Attributes) -> bytes:
        return _ENTRY.pack(of.node, 0, _FOREVER_S, _FOREVER_S, 0, 0) + self._packed(of)

    def _attributes(self, of: Attributes) -> bytes:
        return struct.pack("<QII", _FOREVER_S, 0, 0) + self._packed(of)

    def _directory(self, node: int, body: bytes) -> bytes:
        _, offset, size = _READ_IN.unpack_from(body)
        found = b""
        for position, (name, child) in enumerate(self._operations.entries(node), 1):
            if position <= offset:
                continue
            text = os.fsencode(name)
            kind = stat.S_IFMT(self._operations.attributes(child).mode) >> 12
            entry = struct.pack("<QQII", child, position, len(text), kind) + text
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def _init(body: bytes) -> bytes:
    major, minor, read_ahead, flags = _INIT_IN.unpack_from(body)
    if major < _VERSION[0]:
        raise OSError(errno.EPROTO, "the kernel's FUSE is too old")
    return _INIT_OUT.pack(
        *(_VERSION[0], min(minor, _VERSION[1]) if major == _VERSION[0] else _VERSION[1], read_ahead, flags & _FLAGS),
        *(_MAX_BACKGROUND, _MAX_BACKGROUND, 4096, 1, _MAX_PAGES, 0, 0, 0),
    )
