"""One hierarchy of cgroups and our tree in it: what version 1 and version 2 have in common.

    <base>/forky-<instance>/            the tree
        <machine>/                      time, threads and disk are limited here, for all of the machine's processes
            <pid>/                      memory is limited here, for each process
        frozen/                         processes that have become snapshots; without limits

Memory has a level of its own because a page stays charged to the group whose process touched it first, for ever: no
kernel moves charges any more (version 2 never did, version 1 until 6.12). During a fork the old process becomes a
snapshot that keeps its memory, and the successor needs room for as much again. In one group the successor would be
killed for what its predecessor holds.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

FROZEN = "frozen"
MIB = 1 << 20
PERIOD_US = 100_000  # of the CPU quota; the kernel's own default
STANDS_BACK = 10  # a group that stands back has this part of the usual weight: not none, so that it comes to its end


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a hierarchy is mounted, which part of it, and with which of the controllers that we use."""

    point: Path
    root: PurePosixPath  # this cgroup of the hierarchy is what the mount point shows (mountinfo's 4th field)
    controllers: frozenset[str]  # "cpu", "cpuacct", "memory", "pids", "io"

    def directory(self, cgroup: str) -> Path:
        """Where a cgroup, as /proc/<pid>/cgroup names it, is found; the mount point for one that lies outside."""
        path = PurePosixPath(cgroup)
        return self.point / (path.relative_to(self.root) if path.is_relative_to(self.root) else "")


def write(path: Path, value: object) -> None:
    """One write(2) to a file that is there. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def read_keys(path: Path) -> dict[str, int]:
    """A file with a name and a number in each line; empty when it is gone or the kernel has no such file."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}
    except (OSError, ValueError):
        return {}


def read_number(path: Path) -> int:
    """A file with one number; 0 when it is gone."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def make(directory: Path) -> None:
    """Makes a cgroup unless it is there."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir()


def groups_below(directory: Path) -> list[Path]:
    """The cgroups below; empty when it is gone."""
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, OSError):
        return []


class Hierarchy(ABC):
    """Our tree in one hierarchy. Every method blocks for microseconds and raises OSError."""

    version: int

    def __init__(self, mount: Mount, base: Path, instance: str) -> None:
        self.mount = mount
        self.base = base
        self.tree = base / f"forky-{instance}"
        self.controllers = mount.controllers

    def make_tree(self) -> None:
        """Makes the tree, ready for groups."""
        make(self.tree)

    def make_group(self, name: str) -> Path:
        """Makes the group of a machine."""
        make(self.tree / name)
        return self.tree / name

    def make_frozen(self) -> Path:
        """Makes the group of processes that have become snapshots."""
        make(self.tree / FROZEN)
        return self.tree / FROZEN

    def leaves(self, name: str) -> list[Path]:
        """The groups of a machine's processes, where each has one."""
        return groups_below(self.tree / name) if "memory" in self.controllers else []

    def home_of(self, name: str, pid: int) -> Path:
        """Makes the group into which a machine's process goes."""
        if "memory" not in self.controllers:
            return self.tree / name
        make(self.tree / name / str(pid))
        return self.tree / name / str(pid)

    def group_of(self, pid: int) -> Path | None:
        """The group below our tree that a process is in."""
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            return None
        for number, names, cgroup in (line.split(":", 2) for line in lines):
            if self._is_this(number, names):
                directory = self.mount.directory(cgroup)
                return directory if directory.is_relative_to(self.tree) else None
        return None

    @abstractmethod
    def _is_this(self, number: str, names: str) -> bool:
        """Whether a line of /proc/<pid>/cgroup is about this hierarchy."""

    # -- limits; each only where the hierarchy has the controller -----------------------------------------------------

    @abstractmethod
    def limit_cpu(self, group: Path, cpus: float | None) -> None:
        """Cores' worth of time; None: no limit. The group's weight and real-time allowance become the usual ones."""

    @abstractmethod
    def stand_back(self, group: Path) -> None:
        """A small weight, until the next `limit_cpu`."""

    @abstractmethod
    def favour(self, group: Path) -> None:
        """No limit of CPU time, and the greatest weight, until the next `limit_cpu`."""

    @abstractmethod
    def limit_memory(self, leaf: Path, mib: int) -> None:
        """Memory of one process."""

    def limit_pids(self, group: Path, pids: int) -> None:
        """Threads; the same file in both versions."""
        write(group / "pids.max", pids)

    @abstractmethod
    def limit_io(self, group: Path, device: str, mib_s: int | None) -> None:
        """Reads and writes of a block device ("8:16"), each; None: no limit."""

    # -- what is used -------------------------------------------------------------------------------------------------

    def pids(self, group: Path) -> int:
        """Threads that there are."""
        return read_number(group / "pids.current")

    @abstractmethod
    def cpu_s(self, group: Path) -> float:
        """CPU time used so far."""

    @abstractmethod
    def throttled_s(self, group: Path) -> float:
        """How long the group stood still because its quota was used up."""

    @abstractmethod
    def memory_bytes(self, leaf: Path) -> int:
        """All that is charged."""

    @abstractmethod
    def unreclaimable_bytes(self, leaf: Path) -> int:
        """What the kernel can't take away without swap: anonymous and shared memory."""

    @abstractmethod
    def memory_ceiling_bytes(self, group: Path) -> int | None:
        """What all processes in a group and below may have together; None: as much as there is."""

    @abstractmethod
    def memory_held_bytes(self, group: Path) -> int:
        """What is charged to a group and all below it, less the files' pages, which the kernel takes back first."""

    @abstractmethod
    def oom_kills(self, leaf: Path) -> int:
        """Processes that were killed because the memory limit was met."""


def quota_us(cpus: float) -> int:
    """Of each period; the kernel takes no less than 1000."""
    return max(1000, round(cpus * PERIOD_US))


def processes(directory: Path) -> list[int]:
    """The processes in a cgroup, not in those below it; empty when it is gone."""
    try:
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def remove(directories: Iterable[Path]) -> list[Path]:
    """Removes cgroups with those below them; returns those that are not empty yet."""
    busy = []
    for directory in directories:
        try:
            for leaf in groups_below(directory):
                with contextlib.suppress(FileNotFoundError):
                    leaf.rmdir()
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            busy.append(directory)
    return busy
