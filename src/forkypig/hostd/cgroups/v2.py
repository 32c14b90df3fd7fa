"""cgroup version 2: one hierarchy for all controllers (Documentation/admin-guide/cgroup-v2.rst in Linux).

A cgroup that gives controllers to those below it holds no processes itself, so processes are only in the leaves.

`memory.high` is not set: above it the kernel takes back what it can, as it does at `memory.max`, and then makes the
process sleep. A guest whose memory can't be taken back would not end with a reason, it would crawl.
"""

from pathlib import Path

from forkypig.hostd.cgroups.hierarchy import (
    MIB,
    PERIOD_US,
    STANDS_BACK,
    Hierarchy,
    make,
    quota_us,
    read_keys,
    read_number,
    write,
)

_USUAL_WEIGHT, _MOST_WEIGHT = 100, 10_000
_US = 1e6


class V2(Hierarchy):
    """Our tree in the hierarchy of version 2."""

    version = 2

    def _is_this(self, number: str, names: str) -> bool:
        return number == "0"

    def make_tree(self) -> None:
        self._give(self.base)
        make(self.tree)
        self._give(self.tree)

    def make_group(self, name: str) -> Path:
        group = super().make_group(name)
        if "memory" in self.controllers:
            _give(group, {"memory"})
        return group

    def _give(self, group: Path) -> None:
        _give(group, self.controllers)

    def limit_cpu(self, group: Path, cpus: float | None) -> None:
        write(group / "cpu.max", f"{'max' if cpus is None else quota_us(cpus)} {PERIOD_US}")
        write(group / "cpu.weight", _USUAL_WEIGHT)

    def stand_back(self, group: Path) -> None:
        write(group / "cpu.weight", _USUAL_WEIGHT // STANDS_BACK)

    def favour(self, group: Path) -> None:
        write(group / "cpu.max", f"max {PERIOD_US}")
        write(group / "cpu.weight", _MOST_WEIGHT)

    def limit_memory(self, leaf: Path, mib: int) -> None:
        write(leaf / "memory.max", mib * MIB)

    def limit_io(self, group: Path, device: str, mib_s: int | None) -> None:
        path = group / "io.max"
        if mib_s is not None or path.read_text():  # the first write turns throttling on for the whole device
            value = "max" if mib_s is None else mib_s * MIB
            write(path, f"{device} rbps={value} wbps={value}")

    def cpu_s(self, group: Path) -> float:
        return read_keys(group / "cpu.stat").get("usage_usec", 0) / _US

    def throttled_s(self, group: Path) -> float:
        return read_keys(group / "cpu.stat").get("throttled_usec", 0) / _US

    def memory_bytes(self, leaf: Path) -> int:
        return read_number(leaf / "memory.current")

    def unreclaimable_bytes(self, leaf: Path) -> int:
        found = read_keys(leaf / "memory.stat")
        return found.get("anon", 0) + found.get("shmem", 0)

    def memory_ceiling_bytes(self, group: Path) -> int | None:
        limits = [read_number(group / name) for name in ("memory.max", "memory.high")]  # «max» is no number
        return min((limit for limit in limits if limit > 0), default=None)

    def memory_held_bytes(self, group: Path) -> int:
        found = read_keys(group / "memory.stat")
        reclaimable = ("inactive_file", "active_file", "slab_reclaimable")
        return max(0, read_number(group / "memory.current") - sum(found.get(name, 0) for name in reclaimable))

    def oom_kills(self, leaf: Path) -> int:
        return read_keys(leaf / "memory.events").get("oom_kill", 0)


def _give(group: Path, controllers: frozenset[str] | set[str]) -> None:
    """Lets the groups below this one use the controllers."""
    given = (group / "cgroup.subtree_control").read_text().split()
    for controller in sorted(controllers - set(given)):
        write(group / "cgroup.subtree_control", f"+{controller}")
