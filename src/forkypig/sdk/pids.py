"""Which daemons of a home run, told by their locked pid files, and how one is ended.

A daemon holds a flock on its pid file as long as it lives, so a pid in an unlocked file means nothing, however alive
some process of that number is.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

# server.stop gives open calls one second; hostd and the pager close files besides. Past it something hangs.
TERM_S = 20.0
KILL_S = 10.0


def running_pid(pid_file: Path) -> int | None:
    """The daemon's pid, or None when it does not run."""
    try:
        fd = os.open(pid_file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        pid = json.loads(os.read(fd, 4096) or b"{}").get("pid")
        # The lock is tried only when there is such a process: trying it makes it ours for a moment, and a daemon that
        # starts in this moment would take us for another of its kind.
        if not isinstance(pid, int) or not Path(f"/proc/{pid}").exists():
            return None
        return None if _lock_is_free(fd) else pid
    except ValueError:
        return None
    finally:
        os.close(fd)


def _lock_is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _pidfd(pid_file: Path) -> Iterator[tuple[int, int] | None]:
    """(pid, pidfd) of the daemon; the lock is looked at again once the pidfd is open, so it can't be another's."""
    pid = running_pid(pid_file)
    try:
        fd = os.pidfd_open(pid) if pid is not None else None
    except ProcessLookupError:
        fd = None
    if fd is None or pid is None:
        yield None
        return
    try:
        yield (pid, fd) if running_pid(pid_file) == pid else None
    finally:
        os.close(fd)


async def end(daemon: str, pid_file: Path) -> bool:
    """Ends a daemon by SIGTERM, and by SIGKILL when that takes too long. Returns whether it ran."""
    with _pidfd(pid_file) as found:
        if found is None:
            return False
        await _end(daemon, *found)
    return True


async def end_child(daemon: str, child: subprocess.Popen[bytes]) -> None:
    """The same for one that we started, whether it has a pid file yet or not."""
    if child.poll() is None:
        fd = os.pidfd_open(child.pid)
        try:
            await _end(daemon, child.pid, fd)
        finally:
            os.close(fd)


async def _end(daemon: str, pid: int, fd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGTERM)
    if not await _ended(fd, TERM_S):
        log.warning("the %s (pid %d) has not ended %.0f s after SIGTERM: killing it", daemon, pid, TERM_S)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not await _ended(fd, KILL_S):
            log.error("the %s (pid %d) has not ended %.0f s after SIGKILL", daemon, pid, KILL_S)


async def _ended(pidfd: int, timeout_s: float) -> bool:
    """Waits until the process has ended (a pidfd is readable then)."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
