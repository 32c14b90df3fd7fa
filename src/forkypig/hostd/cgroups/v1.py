"""cgroup version 1: a hierarchy per controller, or per few of them (Documentation/admin-guide/cgroup-v1 in Linux)."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from forkypig.hostd.cgroups.hierarchy import (
    MIB,
    PERIOD_US,
    STANDS_BACK,
    Hierarchy,
    quota_us,
    read_keys,
    read_number,
    write,
)

_USUAL_SHARES, _MOST_SHARES = 1024, 262144
_NS = 1e9
_NO_LIMIT = 1 << 60  # the kernel shows the greatest number of pages that it can count, in bytes

# Real-time allowance of one split, of each period and CPU. A split needs 15 to 20 ms of a CPU; threads that used the
# allowance up stand still until the period is over. The sum over all groups below a group may not exceed its own, and
# the kernel keeps 95 % of the time for all (sched_rt_runtime_us): two splits at once. What was used is forgotten at the
# end of a period, but only by as much as the group is allowed just then: one whose allowance was taken away before
# carries it into its next splits, until one of them stands still. So an allowance outlasts its split by a period.
RT_PERIOD_US = 100_000
SPLIT_RT_US = 45_000


class V1(Hierarchy):
    """Our tree in one hierarchy of version 1."""

    version = 1

    def _is_this(self, number: str, names: str) -> bool:
        ours = {"io" if name == "blkio" else name for name in names.split(",")}
        return bool(ours & self.controllers)

    def limit_cpu(self, group: Path, cpus: float | None) -> None:
        write(group / "cpu.cfs_period_us", PERIOD_US)
        write(group / "cpu.cfs_quota_us", -1 if cpus is None else quota_us(cpus))
        write(group / "cpu.shares", _USUAL_SHARES)

    def stand_back(self, group: Path) -> None:
        write(group / "cpu.shares", _USUAL_SHARES // STANDS_BACK)

    def favour(self, group: Path) -> None:
        write(group / "cpu.cfs_quota_us", -1)
        write(group / "cpu.shares", _MOST_SHARES)

    @property
    def real_time_is_rationed(self) -> bool:
        """Whether SCHED_RR needs an allowance here (CONFIG_RT_GROUP_SCHED): without one it is refused with EPERM."""
        return "cpu" in self.controllers and (self.base / "cpu.rt_runtime_us").exists()

    def ration(self, group: Path, splits: int) -> None:
        """Gives the group its allowance; `splits` have one now, this one included. Raises OSError when the host has
        none left."""
        for path, allowance_us in ((self.tree, splits * SPLIT_RT_US), (group, SPLIT_RT_US)):
            write(path / "cpu.rt_period_us", RT_PERIOD_US)
            write(path / "cpu.rt_runtime_us", allowance_us)

    def withdraw(self, groups: Iterable[Path], splits: int) -> None:
        """Takes their allowances back, and what the tree has beyond its `splits`. What the kernel refuses, as a thread
        is under SCHED_RR still, stays."""
        for path, allowance_us in (*((group, 0) for group in groups), (self.tree, splits * SPLIT_RT_US)):
            with contextlib.suppress(OSError):
                write(path / "cpu.rt_runtime_us", allowance_us)

    def limit_memory(self, leaf: Path, mib: int) -> None:
        write(leaf / "memory.limit_in_bytes", mib * MIB)

    def limit_io(self, group: Path, device: str, mib_s: int | None) -> None:
        for direction in ("read", "write"):
            path = group / f"blkio.throttle.{direction}_bps_device"
            if mib_s is not None or path.read_text():  # the first write turns throttling on for the whole device
                write(path, f"{device} {(mib_s or 0) * MIB}")

    def cpu_s(self, group: Path) -> float:
        return read_number(group / "cpuacct.usage") / _NS

    def throttled_s(self, group: Path) -> float:
        return read_keys(group / "cpu.stat").get("throttled_time", 0) / _NS

    def memory_bytes(self, leaf: Path) -> int:
        return read_number(leaf / "memory.usage_in_bytes")

    def unreclaimable_bytes(self, leaf: Path) -> int:
        found = read_keys(leaf / "memory.stat")
        return found.get("rss", 0) + found.get("shmem", 0)

    def memory_ceiling_bytes(self, group: Path) -> int | None:
        limit = read_number(group / "memory.limit_in_bytes")
        return limit if 0 < limit < _NO_LIMIT else None

    def memory_held_bytes(self, group: Path) -> int:
        found = read_keys(group / "memory.stat")
        files = found.get("total_inactive_file", 0) + found.get("total_active_file", 0)
        return max(0, read_number(group / "memory.usage_in_bytes") - files)

    def oom_kills(self, leaf: Path) -> int:
        return read_keys(leaf / "memory.oom_control").get("oom_kill", 0)
