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


@dataclass(slots=True)
class Memory:
    """Proportional set size of a QEMU process, in MiB: pages that n processes share count a nth."""

    guest_own_mib: float = 0.0  # guest memory that it has written to: pages of its own
    guest_shared_mib: float = 0.0  # its part of guest memory that it shares with its siblings
    code_mib: float = 0.0  # what TCG has translated
    rest_mib: float = 0.0  # QEMU's own

    @property
    def pss_mib(self) -> float:
        """All of it."""
        return self.guest_own_mib + self.guest_shared_mib + self.code_mib + self.rest_mib


def memory(pid: int) -> Memory:
    """Of the QEMU process of a child. Raises OSError when it is gone, or not ours to see."""
    found = Memory()
    header: list[str] = []
    pss = 0.0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0]:
            header = fields
        elif fields[0] == "Pss:":
            pss = int(fields[1]) / 1024
        elif fields[0] == "Anonymous:":
            _add(found, header, pss, int(fields[1]) / 1024)
    return found


def _add(found: Memory, header: list[str], pss: float, anonymous: float) -> None:
    """One mapping: address range, permissions, offset, device, inode and, if it has one, the path."""
    path = header[5] if len(header) > 5 else ""
    if path.endswith("/memory"):  # the pager's file
        found.guest_own_mib += anonymous
        found.guest_shared_mib += max(0.0, pss - anonymous)
    elif header[1].startswith("rwx"):
        found.code_mib += pss
    else:
        found.rest_mib += pss


def available_mib() -> float:
    """Host memory that is left (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _busy_and_all() -> tuple[int, int]:
    fields = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


async def calm(limit_s: float = 5.0, *, below: float = 0.15) -> None:
    """Waits until the host's CPUs are busy for less than `below` of half a second, or for `limit_s`: what the last
    section left behind (pools that refill, processes that end) must not count in the next one."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        busy, everything = _busy_and_all()
        await asyncio.sleep(0.5)
        busy_now, everything_now = _busy_and_all()
        if (busy_now - busy) < below * max(1, everything_now - everything):
            return
