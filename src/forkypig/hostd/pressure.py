"""How little memory is left for machines, and how much they do. Read from /proc and the cgroups that machines stand in:
in a container the host's memory is not theirs to use up. For a worker thread."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forkypig.hostd.cgroups.hierarchy import Hierarchy

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Of /proc/PID/stat, counted after the command's name, which may have spaces: utime and stime (proc_pid_stat(5)).
_UTIME, _STIME = 11, 12
_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True, slots=True)
class Pressure:
    """Of memory. Percentages of the last ten seconds (PSI); 0 where the kernel does not measure them."""

    total_mib: int
    available_mib: int
    some_percent: float
    full_percent: float


def measure(around: Iterable[tuple[Hierarchy, Path]] = (), proc: Path = Path("/proc")) -> Pressure:
    """As it is now: the host's, or that of whichever group `around` machines leaves less. Raises OSError where /proc is
    not mounted."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) >> 10 for name in ("MemTotal", "MemAvailable"))
    some, full = stalls(proc / "pressure/memory")
    for hierarchy, group in around:
        limit = hierarchy.memory_ceiling_bytes(group)
        if limit is None:
            continue
        group_some, group_full = stalls(group / "memory.pressure")  # version 1 has none
        some, full = max(some, group_some), max(full, group_full)
        left = max(0, limit - hierarchy.memory_held_bytes(group)) >> 20
        if left < available:
            total, available = min(total, limit >> 20), left
    return Pressure(total, available, some, full)


def stalls(path: Path) -> tuple[float, float]:
    """`some` and `full` of a PSI file, avg10 (Documentation/accounting/psi.rst); zeros without one."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # not compiled in, or turned off at boot
        return 0.0, 0.0
    found = {line.split()[0]: float(line.split()[1].removeprefix("avg10=")) for line in lines if line}
    return found.get("some", 0.0), found.get("full", 0.0)


def cpu_seconds(pids: Mapping[_Name, int], proc: Path = Path("/proc")) -> dict[_Name, float]:
    """Seconds of CPU that each process has used; those that are gone are left out."""
    used = {}
    for name, pid in pids.items():
        try:
            stat = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used[name] = (int(stat[_UTIME]) + int(stat[_STIME])) / _TICKS_PER_S
    return used
