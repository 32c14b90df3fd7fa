"""What a process has used of the host: CPU time, memory; and how busy the host is."""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path


def cores() -> int:
    """How many CPUs we may use."""
    return len(os.sched_getaffinity(0))


def cpu_ms(pid: int) -> float:
    """CPU time of the process so far, all threads, in ms; 0 when it is gone.

    Its POSIX CPU clock (clock_getcpuclockid(3): the pid's complement, shifted, and 2 for the scheduler's clock).
    /proc/<pid>/stat counts whole ticks of 10 ms, a third of what is measured here.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2) * 1000
    except OSError:
        return 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Proportional set size: pages shared by n processes count a nth. In MiB."""

    pss_mib: float
    anonymous_mib: float
    file_mib: float


def memory(pid: int) -> Memory:
    """Of a process. Raises OSError when it is gone, or not ours to see."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) / 1024
    return Memory(found["Pss"], found.get("Pss_Anon", 0.0), found.get("Pss_File", 0.0) + found.get("Pss_Shmem", 0.0))


def available_mib() -> float:
    """Host memory that is left (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _busy_and_all() -> tuple[int, int]:
    fields = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


async def calm(limit_s: float = 8.0, *, below: float = 0.15) -> None:
    """Waits until the host's CPUs are busy for less than `below` of half a second, or for `limit_s`: what the last
    section left behind (pools that refill, processes that end) must not count in the next one."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        busy, everything = _busy_and_all()
        await asyncio.sleep(0.5)
        busy_now, everything_now = _busy_and_all()
        if (busy_now - busy) < below * max(1, everything_now - everything):
            return
