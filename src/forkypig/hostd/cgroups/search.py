"""Which cgroup hierarchies this host has, where our tree goes in each, and the block device that io limits are for.

Where systemd runs the host, root's tree stands at the root of the hierarchy: a daemon that was started from a login
stands in the session's scope, which systemd ends with the session, and the machines in it too. Elsewhere it stands
below the cgroup that hostd is in: whoever put hostd there, a container's runtime for one, keeps its say over machines.
A tree that is there already is used wherever it stands: another hostd of the same instance has made it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from forkypig.hostd.cgroups.hierarchy import Hierarchy, Mount, processes, remove
from forkypig.hostd.cgroups.v1 import V1
from forkypig.hostd.cgroups.v2 import V2

WANTED = ("cpu", "memory", "pids", "io")
_OURS = frozenset({*WANTED, "cpuacct"})

_NOT_WRITABLE = (
    "{where} can't be written: run forky as root, or as a systemd service with Delegate=yes and "
    "DelegateSubgroup=daemons; in a container mount its cgroups writable"
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where to look; tests look elsewhere."""

    proc: Path = Path("/proc")
    systemd: Path = Path("/run/systemd/system")  # there while systemd is the init (sd_booted(3))
    is_root: bool = os.geteuid() == 0

    @property
    def at_root(self) -> bool:
        return self.is_root and self.systemd.is_dir()


def search(instance: str, where: Surroundings) -> tuple[list[Hierarchy], list[str]]:
    """The hierarchies that can be used, and for each controller that can't be why, and what to do. Never raises."""
    try:
        mounts = list(_mounts((where.proc / "self/mountinfo").read_text()))
        own = dict(_own((where.proc / "self/cgroup").read_text()))
    except (OSError, ValueError, IndexError) as error:
        return [], [f"{name}: /proc can't be read ({error}): mount it" for name in WANTED]
    found: list[Hierarchy] = []
    missing: dict[str, str] = {}
    for version, mount in mounts:
        taken = frozenset(chain.from_iterable(h.controllers for h in found))
        hierarchy, problems = _hierarchy(instance, version, mount, own, where, taken)
        missing.update(problems)
        if hierarchy is not None:
            found.append(hierarchy)
    usable = set(chain.from_iterable(h.controllers for h in found))
    unmounted = "this host has no such cgroup controller mounted: mount one, or boot it with cgroup version 2"
    return found, [f"{name}: {missing.get(name, unmounted)}" for name in WANTED if name not in usable]


def around(instance: str, where: Surroundings) -> list[tuple[Hierarchy, Path]]:
    """The groups that count the memory of this instance's machines, from the one that their tree stands in, or would
    stand in, upwards: of a container's only what it is shown. Nothing is made, and no right to write is needed."""
    try:
        mounts = list(_mounts((where.proc / "self/mountinfo").read_text()))
        own = dict(_own((where.proc / "self/cgroup").read_text()))
        version, mount = next((v, m) for v, m in mounts if "memory" in m.controllers)
        directory = mount.directory(own.get("" if version == 2 else "memory", "/"))
        base = _existing(mount.point, instance) or _base(version, mount.point, directory, where) or directory
    except (OSError, ValueError, IndexError, StopIteration):
        return []
    hierarchy = (V1 if version == 1 else V2)(mount, base, instance)
    return [(hierarchy, group) for group in (base, *base.parents) if group.is_relative_to(mount.point)]


def _mounts(mountinfo: str) -> list[tuple[int, Mount]]:
    """Version and mount of each hierarchy (proc_pid_mountinfo(5)); of one that is mounted twice the first."""
    found: dict[tuple[int, frozenset[str]], Mount] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup2":
            try:
                names = (Path(_unescaped(point)) / "cgroup.controllers").read_text().split()
            except OSError:
                continue
        elif kind == "cgroup":
            names = ["io" if option == "blkio" else option for option in options.split(",")]
        else:
            continue
        controllers = _OURS & set(names)
        version = 2 if kind == "cgroup2" else 1
        if controllers:
            mount = Mount(Path(_unescaped(point)), PurePosixPath(_unescaped(root)), frozenset(controllers))
            found.setdefault((version, mount.controllers), mount)
    return [(version, mount) for (version, _), mount in found.items()]


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _own(cgroups: str) -> list[tuple[str, str]]:
    """Controller ("" for version 2) -> the cgroup that this process is in."""
    rows = (line.split(":", 2) for line in cgroups.splitlines())
    return [("io" if name == "blkio" else name, path) for _, names, path in rows for name in names.split(",")]


def _hierarchy(
    instance: str, version: int, mount: Mount, own: dict[str, str], where: Surroundings, taken: frozenset[str]
) -> tuple[Hierarchy | None, dict[str, str]]:
    """The hierarchy if a tree can be made in it, and what hinders each of its controllers."""
    wanted = mount.controllers - taken
    cgroup = own.get("" if version == 2 else next(iter(sorted(mount.controllers))), "/")
    directory = mount.directory(cgroup)
    try:
        base = _existing(mount.point, instance) or _base(version, mount.point, directory, where)
    except OSError as error:
        return None, dict.fromkeys(wanted, f"{mount.point} can't be read ({error.strerror})")
    if base is None:
        why = (
            f"{directory} holds processes itself, so version 2 gives it no controllers: start hostd in a cgroup of "
            "its own below one without processes (systemd: Delegate=yes and DelegateSubgroup=daemons)"
        )
        return None, dict.fromkeys(wanted, why)
    if not os.access(base, os.W_OK):
        return None, dict.fromkeys(wanted, _NOT_WRITABLE.format(where=base))
    if version == 1:
        return _tried(V1(Mount(mount.point, mount.root, wanted), base, instance), wanted)
    problems: dict[str, str] = {}
    usable = set(wanted)
    for name in sorted(wanted):  # one by one: cpu alone is refused by a kernel that has real-time processes elsewhere
        _, problem = _tried(V2(Mount(mount.point, mount.root, frozenset({name})), base, instance), frozenset({name}))
        problems |= problem
    usable -= set(problems)
    if not usable:
        return None, problems
    return V2(Mount(mount.point, mount.root, frozenset(usable)), base, instance), problems


def _existing(point: Path, instance: str) -> Path | None:
    """Where this instance's tree stands already: at the root, or up to three levels below. One that another user made
    is not believed: they could take its limits away."""
    patterns = (f"{'*/' * depth}forky-{instance}" for depth in range(4))
    trees = (tree for pattern in patterns for tree in sorted(point.glob(pattern)))
    return next((tree.parent for tree in trees if tree.stat().st_uid == os.geteuid()), None)


def _base(version: int, point: Path, own: Path, where: Surroundings) -> Path | None:
    if where.at_root:
        return point
    if version == 1:
        return own
    # Only the root of all may hold processes and give controllers too; it is the one without cgroup.type.
    for directory in (own, *own.parents):
        if not directory.is_relative_to(point):
            break
        if not (directory / "cgroup.type").exists() or not processes(directory):
            return directory
    return None


def _tried(hierarchy: Hierarchy, controllers: frozenset[str]) -> tuple[Hierarchy | None, dict[str, str]]:
    """Makes the tree and removes it again, unless it was there: only a try says whether the host lets us."""
    was_there = hierarchy.tree.exists()
    try:
        hierarchy.make_tree()
    except OSError as error:
        why = f"{hierarchy.base} refuses it ({error.strerror})"
        if "cpu" in controllers and hierarchy.version == 2:
            why += ": a kernel with CONFIG_RT_GROUP_SCHED does so while a real-time process is outside the root cgroup"
        return None, dict.fromkeys(controllers, why)
    finally:
        if not was_there:
            remove([hierarchy.tree])
    return hierarchy, {}


# -- the disk --------------------------------------------------------------------------------------------------------


def block_device(path: Path) -> str | None:
    """The whole disk below a path, "major:minor"; None for a file system that lies on none, or on more than one."""
    try:
        number = path.stat().st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
        if os.major(number) == 0:  # btrfs gives its files a number that is no device's; mountinfo names the device
            device = _mounted_device(device, Path("/proc/self/mountinfo").read_text()) or device
        return whole_disk(device, Path("/sys/dev/block"))
    except (OSError, ValueError, IndexError):
        return None


def whole_disk(device: str, sys_block: Path) -> str:
    """The disk that a partition is on, or the device itself: io limits are for whole disks, the kernel refuses a
    partition's number. Raises OSError for what is no block device."""
    node = (sys_block / device).resolve(strict=True)
    disk = node.parent if (node / "partition").exists() else node
    return (disk / "dev").read_text().strip()


def _mounted_device(number: str, mountinfo: str) -> str | None:
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        source = Path(_unescaped(right.split()[1]))
        if left.split()[2] == number and source.is_block_device():
            found = source.stat().st_rdev
            return f"{os.major(found)}:{os.minor(found)}"
    return None


def nearest(path: Path) -> Path:
    """The nearest directory upwards that exists: a home may not be made yet."""
    return next(p for p in (path, *path.parents) if p.exists())


def describe(hierarchies: Sequence[Hierarchy], missing: Sequence[str]) -> str:
    """One line: what is used, where, and what is not."""
    versions = sorted({h.version for h in hierarchies})
    if not versions:
        return f"none: machines run without limits of their own ({'; '.join(missing)})"
    names = [name for name in WANTED if any(name in h.controllers for h in hierarchies)]
    line = f"version {' and '.join(map(str, versions))} with {', '.join(names)}"
    return line + (f"; without {'; '.join(missing)}" if missing else "")
