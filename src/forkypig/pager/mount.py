"""The mount of the FUSE file system: a stale one is taken away, ours is made and tuned, and taken away at the end.

Nothing here may touch a path below the mount: it would be a request to ourselves.
"""

import ctypes
import os
import socket
import subprocess
from pathlib import Path

import structlog

log = structlog.get_logger()

_MNT_DETACH = 2
_MS_NOSUID, _MS_NODEV = 2, 4
_FUSERMOUNT_TIMEOUT_S = 10.0  # it does no more than a system call
# Measured (bench/pager_faults.py): a first touch takes as long as its read-ahead is large, and what a guest touches
# next is rarely what lies beside. 32 KiB is the knee.
READ_AHEAD_KIB = 32

_libc = ctypes.CDLL(None, use_errno=True)


def attach(mountpoint: Path) -> int:
    """Mounts, and returns the descriptor on which requests come; not blocking. As root, other users may use it: QEMU
    may run as one; the mode bits still count. Raises OSError."""
    if os.geteuid() != 0:
        return _attach_by_helper(mountpoint)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"forky-pager", os.fsencode(mountpoint), b"fuse.forky", flags, options.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code), str(mountpoint))
    return fd


def _attach_by_helper(mountpoint: Path) -> int:
    """By fusermount3, which may mount for ordinary users and sends the descriptor over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            ["fusermount3", "-o", "fsname=forky-pager,subtype=forky,default_permissions", "--", str(mountpoint)],
            check=True,
            timeout=_FUSERMOUNT_TIMEOUT_S,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        _, (fd, *_), _, _ = socket.recv_fds(ours, 1, 1)
    os.set_blocking(fd, False)
    return fd


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


def tune(mountpoint: Path) -> None:
    """Sets read-ahead; without the right to do so it is slower, and says it."""
    device = device_of(mountpoint)
    if device is None:
        return
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        log.warning("mount not tuned", error=str(error))
