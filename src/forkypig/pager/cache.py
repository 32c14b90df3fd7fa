"""How much of a file the kernel's page cache holds: the fast tier. Blocks, and opens files of our own mount: never on
the event loop, which answers that."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from forkypig.pager.index import PageRun

_PAGE_BYTES = 4096
_CACHESTAT = 451  # cachestat(2), Linux 6.5; the same number on all architectures
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache; 0 when it can't be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # forgotten meanwhile
        return 0
    try:
        size = os.fstat(fd).st_size
        counted = _by_cachestat(fd)
        return _by_mincore(fd, size) if counted is None and size else counted or 0
    except OSError:
        return 0
    finally:
        os.close(fd)


def _by_cachestat(fd: int) -> int | None:
    found = _Stat()
    everything = _Range(0, 0)
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(everything), ctypes.byref(found), 0) != 0:
        return None  # an older kernel
    return int(found.cached) * _PAGE_BYTES


def missing(path: Path, runs: Iterable[PageRun]) -> tuple[PageRun, ...]:
    """The pages of these runs that are not in the page cache, in the same order; none when it can't be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # forgotten meanwhile
        return ()
    try:
        found: list[PageRun] = []
        for (first, _), cached in zip(runs, _resident(fd, os.fstat(fd).st_size, runs), strict=True):
            for page, byte in enumerate(cached, first):
                if byte & 1:
                    continue
                if found and sum(found[-1]) == page:
                    found[-1] = found[-1][0], found[-1][1] + 1
                else:
                    found.append((page, 1))
        return tuple(found)
    except OSError:
        return ()
    finally:
        os.close(fd)


def _by_mincore(fd: int, size: int) -> int:
    (resident,) = _resident(fd, size, [(0, -(-size // _PAGE_BYTES))])
    return sum(byte & 1 for byte in resident) * _PAGE_BYTES


def _resident(fd: int, size: int, runs: Iterable[PageRun]) -> list[bytes]:
    """A byte for each page, as mincore(2) has it; the last page's run may end behind the file. Raises OSError.

    By a private, writable mapping: it tells of the page cache only to those who may write the file."""
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        view = (ctypes.c_char * size).from_buffer(mapping)
        try:
            return [_mincore(ctypes.addressof(view), first, count) for first, count in runs]
        finally:
            del view


def _mincore(address: int, first: int, count: int) -> bytes:
    resident = ctypes.create_string_buffer(count)
    if _libc.mincore(address + first * _PAGE_BYTES, count * _PAGE_BYTES, resident) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return resident.raw
