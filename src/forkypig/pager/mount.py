"""The mount of the FUSE file system: a stale one is taken away, ours is made and tuned, and taken away at the end.

Nothing here may touch a path below the mount: it would be a request to ourselves.
"""

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

import structlog

log = structlog.get_logger()

_MNT_DETACH = 2
_FUSERMOUNT_TIMEOUT_S = 10.0  # it does no more than a system call
# Measured (bench/pager_faults.py): a first touch takes as long as its read-ahead is large, and what a guest touches
# next is rarely what lies beside. 32 KiB is the knee.
READ_AHEAD_KIB = 32
# Reads of snapshots that are not bound yet are pending. With the kernel's 12 background requests a dozen of them would
# hold up the read-ahead of every other snapshot, and so the machine that they wait for.
_MAX_BACKGROUND = 65535

_libc = ctypes.CDLL(None, use_errno=True)


def options() -> set[str]:
    """The mount's options. As root, other users may use it: QEMU may run as one; the mode bits still count."""
    chosen = {"fsname=forky-pager", "subtype=forky", "default_permissions"}
    if os.geteuid() == 0:
        chosen.add("allow_other")
    return chosen


def device_of(mountpoint: Path) -> str | None:
    """The «major:minor» of what is mounted there, by the kernel's table; None when nothing is."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = fields[4].encode("latin-1", "backslashreplace").decode("unicode_escape")
        if path.encode("latin-1", "replace") == os.fsencode(mountpoint) or path == str(mountpoint):
            found = fields[2]
    return found


def detach(mountpoint: Path) -> None:
    """Takes away whatever is mounted there; mappings of it live on until they are closed. Fine when nothing is."""
    for _ in range(16):  # a crash may have left several on top of each other
        if device_of(mountpoint) is None:
            return
        if os.geteuid() == 0:
            if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(mountpoint))
        else:
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=True, timeout=_FUSERMOUNT_TIMEOUT_S)


def tune(mountpoint: Path, scratch: Path) -> None:
    """Sets read-ahead and the number of background requests; without the right to do so it is slower, and says it.

    `scratch` is a directory where the kernel's FUSE control file system can be mounted for a moment.
    """
    device = device_of(mountpoint)
    if device is None:
        return
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
        with _control(scratch) as control:
            connection = control / device.split(":")[1]
            (connection / "max_background").write_text(str(_MAX_BACKGROUND))
            (connection / "congestion_threshold").write_text(str(_MAX_BACKGROUND))
    except OSError as error:
        log.warning("mount not tuned", error=str(error))


@contextlib.contextmanager
def _control(scratch: Path):  # type: ignore[no-untyped-def]
    """The directory of FUSE connections (fusectl), mounted for the block where the host has not mounted it."""
    usual = Path("/sys/fs/fuse/connections")
    if any(usual.iterdir()):
        yield usual
        return
    scratch.mkdir(exist_ok=True)
    if _libc.mount(b"fusectl", os.fsencode(scratch), b"fusectl", 0, None) != 0:
        code = ctypes.get_errno()
        scratch.rmdir()
        raise OSError(code, os.strerror(code), "fusectl")
    try:
        yield scratch
    finally:
        _libc.umount2(os.fsencode(scratch), _MNT_DETACH)
        scratch.rmdir()
