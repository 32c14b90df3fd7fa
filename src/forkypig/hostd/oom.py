"""Whom the kernel ends when memory is out all the same: a running machine, which `forky start` boots again, and not the
pager or hostd, on which all machines depend, the host's own programs, or a frozen process, which is a snapshot."""

import contextlib
from pathlib import Path

from forkypig.hostd.cgroups.hierarchy import write

# As if the process had half of all memory besides its own (proc_pid_oom_score_adj(5)): a small machine goes before a
# large program of somebody else. Of several machines the largest goes.
_FIRST = 500


def offer(pid: int, proc: Path = Path("/proc")) -> None:
    """The process is a machine's. Anybody may raise this figure, also for one that hostd's unit has lowered. Never
    raises."""
    _set(proc / str(pid), _FIRST)


def spare(pid: int, proc: Path = Path("/proc")) -> None:
    """The process has become a snapshot. Never raises: without the right to, it stays as it is."""
    _set(proc / str(pid), 0)


def _set(process: Path, figure: int) -> None:
    with contextlib.suppress(OSError):  # it has ended, or /proc is not ours to write
        write(process / "oom_score_adj", figure)
