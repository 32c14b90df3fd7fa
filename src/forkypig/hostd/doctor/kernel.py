"""What the host's kernel must offer: the checks of `forky doctor` that look at system calls and /proc."""

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path

from forkypig.hostd.checks import Check, failed, ok

PROC = Path("/proc")


def system_calls() -> Check:
    """The system calls without which nothing works; both are older than every supported distribution's kernel, but
    containers and seccomp profiles take them away."""
    calls: dict[str, Callable[[], int]] = {
        "memfd_create": lambda: os.memfd_create("forky-doctor"),
        "pidfd_open": lambda: os.pidfd_open(os.getpid()),
    }
    missing = []
    for name, call in calls.items():
        try:
            os.close(call())
        except OSError:
            missing.append(name)
    release = platform.release()
    if missing:
        return failed(
            "kernel",
            f"{release} refuses {' and '.join(missing)}",
            "use Linux 5.10 or later; in a container, loosen its seccomp profile",
        )
    return ok("kernel", f"{release} has memfd_create and pidfd_open")


def pagemap() -> Check:
    """Whether private pages can be told from those of a file: bit 63 present, bit 61 file page or shared (the
    kernel's Documentation/admin-guide/mm/pagemap.rst)."""
    size = mmap.PAGESIZE
    remedy = "the pager needs it to find a machine's own pages: use a kernel with CONFIG_PROC_PAGE_MONITOR"
    descriptor = os.memfd_create("forky-doctor")
    try:
        os.ftruncate(descriptor, size)
        with (
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private,
            mmap.mmap(descriptor, size) as shared,
        ):
            private[0] = shared[0] = 1
            entries = [_pagemap_entry(private), _pagemap_entry(shared)]
    except OSError as error:
        return failed("pagemap", f"/proc/PID/pagemap can't be read: {error.strerror}", remedy)
    finally:
        os.close(descriptor)
    bits = [(entry >> 63 & 1, entry >> 61 & 1) for entry in entries]
    if bits != [(1, 0), (1, 1)]:
        return failed("pagemap", f"it does not tell private pages from shared ones (bits 63 and 61: {bits})", remedy)
    return ok("pagemap", "tells a machine's own pages from shared ones")


def _pagemap_entry(mapping: mmap.mmap) -> int:
    # A ctypes view is the way to a mapping's address; it must be gone before the mapping can be closed.
    view = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(view)
    del view
    with (PROC / "self/pagemap").open("rb", buffering=0) as entries:
        entries.seek(address // mmap.PAGESIZE * 8)
        return int.from_bytes(entries.read(8), "little")


def process_memory() -> Check:
    """The pager reads frozen processes that are not its children, which ptrace_scope can forbid (ptrace(2))."""
    probe = ctypes.create_string_buffer(b"forky-doctor")
    with (PROC / "self/mem").open("rb", buffering=0) as memory:
        memory.seek(ctypes.addressof(probe))
        seen = memory.read(12)
    if seen != b"forky-doctor":
        return failed("process memory", "/proc/PID/mem answers with something else", "use an unmodified Linux kernel")
    scope_file = PROC / "sys/kernel/yama/ptrace_scope"
    scope = int(scope_file.read_text()) if scope_file.is_file() else 0
    if scope == 3 or (scope > 0 and os.geteuid() != 0):
        return failed(
            "process memory",
            f"kernel.yama.ptrace_scope is {scope}: the pager may not read machines' memory",
            "run forky as root" if scope < 3 else "boot with kernel.yama.ptrace_scope=1: 3 can't be undone before that",
        )
    return ok("process memory", "/proc/PID/mem of other processes can be read")
