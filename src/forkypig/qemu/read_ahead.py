"""Keeps the kernel from reading 4 MiB of a snapshot for one page that a machine touches.

QEMU marks all guest memory MADV_HUGEPAGE. Since 5.18 the kernel takes that, at a fault in a mapped file, for a wish to
have two huge pages' worth read around it, whatever the file system's read-ahead is (mm/filemap.c,
do_sync_mmap_readahead): measured, 10 ms a fault instead of 0.2, and a parent that stood still for 280 ms after its
pause. QEMU has no option against it, so the advice is taken away: a seccomp filter, inherited by the processes that
we start, answers this one system call with success and does nothing. Huge pages are lost by it nowhere: private
mappings of files, which is what machines run on, never have any.
"""

import ctypes
import platform
import struct

import structlog

log = structlog.get_logger()

# Source of the numbers: linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h, asm/unistd.h.
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _SUCCEED = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with the error 0
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ADVICE = 0, 4, 32  # offsets in struct seccomp_data; the third argument's low half
_MADV_HUGEPAGE = 14
_MADVISE = {"x86_64": (0xC000003E, 28), "aarch64": (0xC00000B7, 233)}  # AUDIT_ARCH_…, __NR_madvise

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def ignore_huge_page_advice() -> None:
    """From now on MADV_HUGEPAGE does nothing in this process and in all that it starts. Before there are threads.

    Where it can't be had machines work and stall longer, and the log says so.
    """
    known = _MADVISE.get(platform.machine())
    if known is None:
        log.warning("machines will stall longer after forks: no filter is known here", machine=platform.machine())
        return
    architecture, madvise = known
    code = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _AT_ARCHITECTURE),
            (_JUMP_EQUAL, 0, 5, architecture),
            (_LOAD, 0, 0, _AT_NUMBER),
            (_JUMP_EQUAL, 0, 3, madvise),
            (_LOAD, 0, 0, _AT_ADVICE),
            (_JUMP_EQUAL, 0, 1, _MADV_HUGEPAGE),
            (_RETURN, 0, 0, _SUCCEED),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    program = _Program(len(code) // 8, code)
    # Without privileges the kernel wants the promise that nobody gains any (no set-user-id programs below hostd).
    if _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program)) != 0 and (
        _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0) != 0
        or _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program)) != 0
    ):
        log.warning("machines will stall longer after forks: the kernel takes no seccomp filter")


def _prctl(option: int, first: int, second: int) -> int:
    return int(
        _libc.prctl(
            ctypes.c_int(option), ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0)
        )
    )
