"""The cgroups of this host's machines: each machine in a group of its own, with limits of CPU time, memory, threads and
disk, on version 1, version 2 or a mix of them. Where the host allows none all of this does nothing, and `missing`
says why.

Everything blocks: mostly for some microseconds, `add` and `park` for a grace period of the kernel (some 8 ms), `remove`
until exiting processes are gone. Call it in a thread.
"""

import asyncio
import contextlib
import errno
import re
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import structlog

from forkypig.core.limits_of_children import completed
from forkypig.errors import InvalidRequest, MachineFailed, NotPossibleNow, ResourceExhausted
from forkypig.hostd import oom
from forkypig.hostd.cgroups.hierarchy import FROZEN, MIB, Hierarchy, groups_below, processes, remove, write
from forkypig.hostd.cgroups.search import Surroundings, block_device, describe, nearest, search
from forkypig.hostd.cgroups.v1 import RT_PERIOD_US, V1
from forkypig.model import Limits, Shape

log = structlog.get_logger()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# A killed process with gigabytes of memory takes up to a second to give it back, and is in its group until then.
_REMOVE_TIMEOUT_S = 3.0
_REMOVE_INTERVAL_S = 0.02
_RT_LASTS_S = 1.5 * RT_PERIOD_US / 1e6


@dataclass(frozen=True, slots=True)
class Usage:
    """What a machine's group uses; None: this host doesn't count it."""

    cpu_s: float | None
    memory_bytes: int | None
    pids: int | None
    oom_kills: int | None  # of the processes that are there
    throttled_s: float | None  # how long it stood still because its CPU quota was used up


class Cgroups:
    """All groups of one instance."""

    def __init__(self, instance: str, hierarchies: list[Hierarchy], missing: list[str], device: str | None) -> None:
        """`find` makes these. `device`: the disk that io limits are for, "major:minor"."""
        self.instance = instance
        self.hierarchies = hierarchies
        self.missing = tuple(missing)
        self.device = device
        self._allowed: dict[str, asyncio.TimerHandle | None] = {}  # who has real time, and what takes it back
        self._lock = threading.Lock()

    @classmethod
    def find(cls, instance: str, disk: Path | None = None, where: Surroundings | None = None) -> "Cgroups":
        """Looks at the host. `disk`: a path on the disk that machines lie on; without it there is no limit of io.
        Never raises."""
        instance = re.sub(r"[^A-Za-z0-9_-]", "-", instance) or "default"
        hierarchies, missing = search(instance, where or Surroundings())
        device = block_device(nearest(disk)) if disk is not None else None
        if device is None and not any(line.startswith("io:") for line in missing):
            on = f"{disk} does not lie on one block device" if disk is not None else "no disk was named"
            missing.append(f"io: {on}, so its reads and writes can't be limited: put FORKY_HOME on a plain disk")
        return cls(instance, hierarchies, missing, device)

    def describe(self) -> str:
        """One line for people: what is used here, and what is not and why."""
        return describe(self.hierarchies, self.missing)

    def make(self, name: str, limits: Limits, shape: Shape, accelerator: str) -> "Group":
        """Makes a machine's group, or takes over the one that is there, and sets its limits (None: the usual one).

        Raises ResourceExhausted when the host has no room for it, NotPossibleNow when a process that is in it uses more
        memory than its limit, InvalidRequest for a limit that can't be set here.
        """
        if not _NAME.fullmatch(name) or name == FROZEN:
            raise InvalidRequest(f"«{name}» can't be a cgroup's name: use letters, digits, dots, dashes")
        for hierarchy in self.hierarchies:
            try:
                hierarchy.make_tree()
                hierarchy.make_group(name)
            except OSError as error:
                raise ResourceExhausted(
                    f"the host can't make a cgroup for «{name}» below {hierarchy.tree}: {error.strerror}; remove "
                    "machines, or raise cgroup.max.descendants above it"
                ) from error
        group = Group(self, name, shape, accelerator)
        group.set(limits)
        return group

    def park(self, pid: int) -> None:
        """A process has become a snapshot: it leaves its machine's group. The memory that it holds stays charged to
        the group that it leaves, until the process ends, and limits nobody."""
        oom.spare(pid)
        for hierarchy in self.hierarchies:
            left = hierarchy.group_of(pid)
            try:
                hierarchy.make_tree()
                _move(pid, hierarchy.make_frozen())
            except OSError as error:
                log.warning("a frozen process stays in its cgroup", pid=pid, cgroup=str(left), error=error.strerror)
                continue
            if left is not None and left.parent.parent == hierarchy.tree:
                remove([left])

    def names(self) -> set[str]:
        """The groups that are there, whoever made them."""
        return {group.name for h in self.hierarchies for group in groups_below(h.tree)} - {FROZEN}

    def sweep(self, keep: Set[str]) -> None:
        """Removes the groups that are not to be kept and hold no processes, and what a hostd that died in the middle of
        a split left in force. Never raises."""
        for name in self.names() - keep:
            if busy := remove(h.tree / name for h in self.hierarchies):
                log.warning("a cgroup that nobody knows holds processes", cgroup=str(busy[0]), pids=_all_in(busy[0]))
        self._withdraw(self.names() - self._allowed.keys())

    def remove_all(self) -> None:
        """Removes all groups and the tree, after the last process ended. Never raises."""
        remove_patiently([h.tree / name for h in self.hierarchies for name in {FROZEN, *self.names()}])
        remove_patiently([h.tree for h in self.hierarchies])

    # -- real time ----------------------------------------------------------------------------------------------------

    def _rationed(self) -> list[V1]:
        return [h for h in self.hierarchies if isinstance(h, V1) and h.real_time_is_rationed]

    @contextlib.contextmanager
    def _splits(self, group: "Group") -> Iterator[None]:
        self._allow(group.name)
        try:
            yield
        finally:
            group.restore_cpu()
            if group.name in self._allowed:
                later = asyncio.get_running_loop().call_later(_RT_LASTS_S, self._withdraw, {group.name})
                self._allowed[group.name] = later

    def _allow(self, name: str) -> None:
        if not (rationed := self._rationed()):
            return
        with self._lock:
            if ended := self._allowed.get(name):
                ended.cancel()
            self._allowed[name] = None
            for hierarchy in rationed:
                try:
                    hierarchy.ration(hierarchy.tree / name, len(self._allowed))
                except OSError as error:  # other splits have all there is; without its quota it is still fast
                    log.debug("no real-time allowance for a split", machine=name, error=error.strerror)

    def _withdraw(self, names: Set[str]) -> None:
        with self._lock:
            for name in names:
                self._allowed.pop(name, None)
            for hierarchy in self._rationed():
                hierarchy.withdraw([hierarchy.tree / name for name in names], len(self._allowed))


class Group:
    """One machine's group, in all hierarchies."""

    def __init__(self, groups: Cgroups, name: str, shape: Shape, accelerator: str) -> None:
        """`Cgroups.make` makes these."""
        self.name = name
        self._groups = groups
        self._shape, self._accelerator = shape, accelerator
        self.limits = completed(Limits(), shape, accelerator)

    def add(self, pid: int) -> None:
        """A process joins with all its threads, or comes back after `park`. What it has allocated until then stays
        charged where it was. One that has ended is passed over. Raises MachineFailed when the host refuses."""
        oom.offer(pid)
        for hierarchy in self._groups.hierarchies:
            try:
                home = hierarchy.home_of(self.name, pid)
                if "memory" in hierarchy.controllers and self.limits.memory_mib is not None:
                    hierarchy.limit_memory(home, self.limits.memory_mib)
                _move(pid, home)
            except ProcessLookupError:
                return
            except OSError as error:
                raise MachineFailed(
                    f"process {pid} can't be put into the cgroup of «{self.name}» below {hierarchy.tree}: "
                    f"{error.strerror}; see forky doctor"
                ) from error

    def set(self, limits: Limits) -> None:
        """Changes the limits, also while the machine runs. None: the usual one.

        Raises NotPossibleNow, with all limits as they were, for less memory than is in use; InvalidRequest for a limit
        that can't be set here.
        """
        wanted = completed(limits, self._shape, self._accelerator)
        if limits.io_mib_s is not None and self._groups.hierarchies and self._groups.device is None:
            raise InvalidRequest("this host can't limit a machine's disk: leave --io-limit out, or see forky doctor")
        self._limit_memory(wanted)
        self.limits = wanted
        for hierarchy in self._groups.hierarchies:
            group = hierarchy.tree / self.name
            try:
                if "cpu" in hierarchy.controllers:
                    hierarchy.limit_cpu(group, wanted.cpus)
                if "pids" in hierarchy.controllers and wanted.pids is not None:
                    hierarchy.limit_pids(group, wanted.pids)
                if "io" in hierarchy.controllers and self._groups.device is not None:
                    hierarchy.limit_io(group, self._groups.device, wanted.io_mib_s)
            except OSError as error:
                raise InvalidRequest(
                    f"the host refuses a limit of «{self.name}» in {group}: {error.strerror}; "
                    f"asked were {wanted.cpus} CPUs, {wanted.pids} threads, {wanted.io_mib_s} MiB/s of disk"
                ) from error

    def _limit_memory(self, wanted: Limits) -> None:
        assert wanted.memory_mib is not None  # `completed` gives every machine one
        leaves = [(h, leaf) for h in self._groups.hierarchies for leaf in h.leaves(self.name)]
        for hierarchy, leaf in leaves:
            held = hierarchy.unreclaimable_bytes(leaf)
            # Version 2 would kill the process at once.
            if held > wanted.memory_mib * MIB:
                raise NotPossibleNow(
                    f"«{self.name}» uses {-(-held // MIB)} MiB of memory that can't be taken away, so its limit can't "
                    f"be {wanted.memory_mib} MiB: give it more with --memory-limit"
                )
        for hierarchy, leaf in leaves:
            try:
                hierarchy.limit_memory(leaf, wanted.memory_mib)
            except FileNotFoundError:
                continue  # its process was parked or ended meanwhile
            except OSError as error:
                raise NotPossibleNow(
                    f"the memory limit of «{self.name}» can't be {wanted.memory_mib} MiB now ({error.strerror}): "
                    "give it more with --memory-limit"
                ) from error

    @contextlib.contextmanager
    def real_time(self) -> Iterator[None]:
        """Within it the machine's processes may run under SCHED_RR, and no used-up quota holds them.

        Enter it before the pause, in an event loop, leave it with all threads under ordinary scheduling again. Never
        raises.
        """
        with self._groups._splits(self):
            for hierarchy in self._cpu():
                with contextlib.suppress(OSError):
                    hierarchy.favour(hierarchy.tree / self.name)
            yield

    def stand_back(self) -> None:
        """The machine gets little of the CPU where others want it, until `restore_cpu`. Never raises."""
        for hierarchy in self._cpu():
            with contextlib.suppress(OSError):
                hierarchy.stand_back(hierarchy.tree / self.name)

    def restore_cpu(self) -> None:
        """Puts the CPU limit back in force."""
        for hierarchy in self._cpu():
            with contextlib.suppress(OSError):
                hierarchy.limit_cpu(hierarchy.tree / self.name, self.limits.cpus)

    def _cpu(self) -> list[Hierarchy]:
        return [h for h in self._groups.hierarchies if "cpu" in h.controllers]

    def usage(self) -> Usage:
        """What it uses now. Never raises."""
        by_name = {name: h for h in self._groups.hierarchies for name in h.controllers}
        cpu, memory, pids = by_name.get("cpu"), by_name.get("memory"), by_name.get("pids")
        time_of = by_name.get("cpuacct") or (cpu if cpu is not None and cpu.version == 2 else None)
        leaves = memory.leaves(self.name) if memory is not None else []
        return Usage(
            cpu_s=time_of.cpu_s(time_of.tree / self.name) if time_of else None,
            memory_bytes=sum(memory.memory_bytes(leaf) for leaf in leaves) if memory else None,
            pids=pids.pids(pids.tree / self.name) if pids else None,
            oom_kills=sum(memory.oom_kills(leaf) for leaf in leaves) if memory else None,
            throttled_s=cpu.throttled_s(cpu.tree / self.name) if cpu else None,
        )

    def remove(self) -> None:
        """Removes it after its last process ended. Never raises."""
        remove_patiently([h.tree / self.name for h in self._groups.hierarchies])


def _move(pid: int, group: Path) -> None:
    """Moves a process with all its threads. Raises ProcessLookupError when it has ended."""
    try:
        write(group / "cgroup.procs", pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise ProcessLookupError(errno.ESRCH, error.strerror) from error
        raise


def _all_in(group: Path) -> list[int]:
    return [pid for directory in (group, *groups_below(group)) for pid in processes(directory)]


def remove_patiently(directories: list[Path]) -> None:
    """Removes cgroups whose processes have been told to end; says so when one stays. Never raises."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while directories := remove(directories):
        if time.monotonic() > deadline:
            for directory in directories:
                log.warning("a cgroup can't be removed", cgroup=str(directory), pids=_all_in(directory))
            return
        time.sleep(_REMOVE_INTERVAL_S)
