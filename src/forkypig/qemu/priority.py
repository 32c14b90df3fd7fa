"""The scheduling of QEMU's threads: low while a shell starts, real-time for the milliseconds of a split.

Measured in the design: with every core busy the pause grew from 17 to 70 ms, because the successor waited for a CPU.
Nice values are of no use between sessions where the kernel groups tasks by session (sched_autogroup), so the split
uses SCHED_RR, which stands above all of that. The kernel's real-time throttling bounds what a defect could cost.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

log = structlog.get_logger()

_QEMU = os.sched_param(1)
# Our daemons stand above QEMU: a vCPU that spins would otherwise hold up the pager that it is waiting for, and hostd,
# which hears of the end of the pause (measured with a guest that rewrites its memory).
_DAEMON = os.sched_param(2)
_NORMAL = os.sched_param(0)


def threads(pid: int) -> list[int]:
    """Thread ids of a process; empty when it is gone."""
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _set(pid: int, policy: int, param: os.sched_param) -> None:
    for thread in threads(pid):
        try:
            os.sched_setscheduler(thread, policy, param)
        except ProcessLookupError:
            continue
        except PermissionError:  # not root, or a cgroup outside of its `real_time`: the pause is longer under load
            log.debug("real-time scheduling refused", pid=pid)
            return


def normal(pid: int) -> None:
    """Puts a process back to ordinary scheduling."""
    _set(pid, os.SCHED_OTHER, _NORMAL)


@contextlib.contextmanager
def during_split(machines: Sequence[int], daemons: Sequence[int]) -> Iterator[None]:
    """Runs the block with these processes above all ordinary ones, QEMU's below our daemons."""
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    try:
        for pid in daemons:
            _set(pid, policy, _DAEMON)
        for pid in machines:
            _set(pid, policy, _QEMU)
        yield
    finally:
        for pid in (*machines, *daemons):
            normal(pid)


def background(pid: int) -> None:
    """Lets a shell that starts ahead of need yield to machines that run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, 10)


def foreground(pid: int) -> None:
    """Takes `background` back, for all threads that exist by now."""
    for thread in threads(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, 0)
