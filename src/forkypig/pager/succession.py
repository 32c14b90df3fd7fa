"""Who serves a mount, written down by the holder for the keeper that comes after its own: `run/holder.json`.

A keeper that starts and finds a holder alive takes copies of its descriptors (pidfd_getfd, Linux 5.6) and keeps it.
That needs the right to trace it, which root has; without it the holder is ended, as if it had died with its keeper.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.get_logger()

AFTER = "--after"  # a keeper's argument, before home and level of the log: it is the next one
CAN_NOT_BE = 78  # a holder's exit code (EX_CONFIG in sysexits.h): another would end as it did

_LOOK_EVERY_MS = 250
_PIDFD_GETFD = 438  # the number of the system call, on every architecture
_MODULE = b"forkypig.pager.holder"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A holder that serves, with our own copies of its descriptors."""

    pid: int
    pidfd: int
    fuse: int
    inbox: int
    key: int = -1  # of the store, where it has one


def write(path: Path, fuse: int, inbox: int, key: int = -1) -> None:
    """Says that this process is the holder now."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"pid": os.getpid(), "fuse": fuse, "inbox": inbox, "key": key}))
    part.replace(path)


def find(path: Path) -> Found | None:
    """The holder that the file names, if it lives and can be taken over."""
    try:
        said = json.loads(path.read_bytes())
        pid = int(said["pid"])
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        try:
            if _MODULE not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return None  # another process has its number now
            fuse = _copied(pidfd, int(said["fuse"]))
            undo.callback(os.close, fuse)
            inbox = _copied(pidfd, int(said["inbox"]))
            undo.callback(os.close, inbox)
            key = _copied(pidfd, said["key"]) if said.get("key", -1) >= 0 else -1  # older holders do not tell
            found = Found(pid, pidfd, fuse, inbox, key)
        except PermissionError as error:
            log.error("a holder without a keeper can't be taken over: it is ended", pid=pid, error=str(error))
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return None
        except OSError:
            return None  # it has just ended
        undo.pop_all()
        return found


def wait(pid: int, pidfd: int) -> None:
    """Until this process, the holder, answers nothing any more: it has ended, or all that is left of it is threads that
    can't. One that pushes a page (FUSE_NOTIFY_STORE) waits for the lock of a page that somebody reads, uninterruptibly,
    and the answer to that read, which the next holder has in its inbox, is what ends it."""
    with contextlib.suppress(OSError):  # it is gone
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        while not ended.poll(_LOOK_EVERY_MS):
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"ZX":
                log.error("the holder was killed and can't end yet: another goes on", holder=pid)
                return


def _copied(pidfd: int, fd: int) -> int:
    """Our own descriptor of what is `fd` there; as all that Python makes, not for our children."""
    copy: int = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copy
