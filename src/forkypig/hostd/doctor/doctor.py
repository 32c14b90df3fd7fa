"""What this host must offer, whether it does, and how to mend it: the checks behind `forky doctor`.

Every check looks at the thing itself and not at a version number that suggests it, and every one works on a host that
has nothing at all. What an instance left behind is in leftovers.py.
"""

import asyncio
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.hostd import pressure
from forkypig.hostd.cgroups import search as cgroup_search
from forkypig.hostd.cgroups.cgroups import Cgroups
from forkypig.hostd.checks import Check, failed, ok, warning
from forkypig.hostd.doctor import kernel, leftovers
from forkypig.hostd.network import instance_of
from forkypig.net.doctor import missing
from forkypig.qemu.accelerator import KVM_DEVICE, Accelerator, QemuBuild, choose, qemu_build

__all__ = ["Check", "checks", "disk_available_mib"]

FUSE_DEVICE = Path("/dev/fuse")
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

# Where distributions put administrators' programs; not in every user's PATH.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_FILES_PER_MACHINE = 16  # descriptors of ours: QMP, agent, pidfd, and what a fork needs for a while
_TASKS_PER_MACHINE = 8  # threads of one QEMU process with two vCPUs
_ENOUGH_MACHINES = 500


def disk_available_mib(settings: Settings) -> int:
    """Room on the disk that the home is on, or will be."""
    return shutil.disk_usage(_existing(settings.home)).free >> 20


async def checks(settings: Settings, build: QemuBuild | None, accelerator: Accelerator | None) -> list[Check]:
    """All checks, in the order to read them in. `build` and `accelerator` are what hostd found at its start; where it
    found none, they are looked for again, so that what was mended since shows."""
    found = [await _qemu(settings, build), await _kvm(settings, accelerator)]
    found += await asyncio.to_thread(_plain_checks, settings)
    return found + await leftovers.checks(settings)


def _plain_checks(settings: Settings) -> list[Check]:
    plain: dict[str, Callable[[], Check]] = {
        "fuse": _fuse,
        "tools": _tools,
        "disk": lambda: _disk(settings),
        "memory": lambda: _memory(settings),
        "overcommit": _overcommit,
        "network": lambda: _network(settings),
        "cgroups": lambda: _cgroups(settings),
        "kernel": kernel.system_calls,
        "pagemap": kernel.pagemap,
        "process memory": kernel.process_memory,
        "open files": _open_files,
        "processes": _process_limit,
    }
    return [_look(name, check) for name, check in plain.items()]


def _look(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; one that can't look is a finding too, and the others go on."""
    try:
        return check()
    except (OSError, ValueError, KeyError) as error:
        return warning(name, f"could not be looked at: {error}", "see whether /proc and /sys are mounted here")


# -- what machines run on ---------------------------------------------------------------------------------------------


async def _qemu(settings: Settings, build: QemuBuild | None) -> Check:
    try:
        found = await qemu_build(settings.qemu)
    except ForkyError as error:
        return failed("qemu", str(error), "install QEMU 7.2 or later: apt install qemu-system-x86")
    detail = f"{found.version_text}, machine type {found.machine_type}"
    if build is not None and found.build_id != build.build_id:
        return warning(
            "qemu",
            f"{detail}; it was changed while hostd ran, which still counts on {build.build_id}",
            "forky down, then forky up; snapshots of the other build can only be loaded by that build",
        )
    if build is None:
        return warning("qemu", f"{detail}; hostd did not find it when it started", "forky down, then forky up")
    return ok("qemu", detail)


async def _kvm(settings: Settings, accelerator: Accelerator | None) -> Check:
    if accelerator is None:
        try:
            accelerator = await choose(settings.qemu, settings.accelerator, settings.home / "cache")
        except ForkyError as error:
            return failed("kvm", str(error), "see the line above, or set FORKY_ACCELERATOR=auto")
    if accelerator.name == "kvm" or settings.accelerator == "tcg":
        return ok("kvm", accelerator.reason)
    if not KVM_DEVICE.exists():
        remedy = (
            "machines run without KVM, about ten times slower; on a real computer turn virtualization on in its "
            "firmware and load kvm_intel or kvm_amd; in a virtual machine ask for nested virtualization"
        )
    elif not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        remedy = f"let this user open {KVM_DEVICE}: usermod -aG kvm USER, then log in again"
    else:
        remedy = "machines run without KVM, about ten times slower; the cause is this host's (nested) virtualization"
    return warning("kvm", accelerator.reason, remedy)


def _network(settings: Settings) -> Check:
    if settings.network in ("user", "none"):
        return ok("network", f"FORKY_NETWORK={settings.network}")
    if lacking := missing():
        return warning(
            "network",
            f"machines have QEMU's user-mode network, without addresses of their own: {'; '.join(lacking)}",
            "mend that and run forky down, up; docs/network.md says what the user-mode network can't do",
        )
    return ok("network", "each machine can have a namespace and an address of its own")


def _cgroups(settings: Settings) -> Check:
    groups = Cgroups.find(instance_of(settings), settings.home)
    if groups.missing:
        return warning("cgroups", groups.describe(), "docs/limits.md says how each controller is made available")
    return ok("cgroups", groups.describe())


def _fuse() -> Check:
    if not FUSE_DEVICE.exists():
        return failed("fuse", f"there is no {FUSE_DEVICE}", "modprobe fuse; in a container, pass /dev/fuse in")
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return failed("fuse", f"{FUSE_DEVICE} can't be opened: {error.strerror}", "run forky as root, or with sudo")
    if shutil.which("fusermount3", path=_PATH) is None:
        return failed("fuse", "there is no fusermount3", "apt install fuse3")
    return ok("fuse", f"{FUSE_DEVICE} opens, fusermount3 is there")


def _tools() -> Check:
    packages = {
        "mmdebstrap": "mmdebstrap",
        "mke2fs": "e2fsprogs",
        "busybox": "busybox-static",
        "qemu-img": "qemu-utils",
    }
    missing = [tool for tool in packages if shutil.which(tool, path=_PATH) is None]
    if not missing:
        return ok("tools", f"{', '.join(packages)} are there")
    remedy = f"apt install {' '.join(packages[tool] for tool in missing)}"
    if "qemu-img" in missing:
        return failed("tools", "there is no qemu-img, which makes every machine's disk", remedy)
    return warning("tools", f"there is no {' and no '.join(missing)}: images can't be built here", remedy)


# -- space ------------------------------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """The nearest directory upwards that exists: the home may not be made yet."""
    return next(p for p in (path, *path.parents) if p.exists())


def _disk(settings: Settings) -> Check:
    free_gib = disk_available_mib(settings) / 1024
    detail = f"{free_gib:.1f} GiB free for {settings.home}"
    remedy = "free some space, remove machines and snapshots, or put FORKY_HOME on another disk"
    if free_gib < 2:
        return failed("disk", detail, remedy)
    return warning("disk", detail, remedy) if free_gib < 10 else ok("disk", detail)


def _memory(settings: Settings) -> Check:
    around = cgroup_search.around(instance_of(settings), cgroup_search.Surroundings())
    found = pressure.measure(around, PROC)
    detail = f"{found.available_mib / 1024:.1f} of {found.total_mib / 1024:.1f} GiB available"
    if limits := [group for hierarchy, group in around if hierarchy.memory_ceiling_bytes(group) is not None]:
        detail += f", as limited by {limits[0]}"
    remedy = "end something, or run fewer and smaller machines (forky run --memory)"
    if found.available_mib < 512:
        return failed("memory", detail, remedy)
    return warning("memory", detail, remedy) if found.available_mib < 2048 else ok("memory", detail)


def _overcommit() -> Check:
    mode = int((PROC / "sys/vm/overcommit_memory").read_text())
    if mode == 2:
        return warning(
            "overcommit",
            "vm.overcommit_memory is 2: every child is charged all of its memory, though it shares nearly all",
            "sysctl vm.overcommit_memory=0",
        )
    return ok("overcommit", f"vm.overcommit_memory is {mode}: children are charged what they write")


def _open_files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return ok("open files", "not limited")
    machines = hard // _FILES_PER_MACHINE
    detail = f"{hard} open files for each daemon: enough for about {machines} machines"
    if machines < _ENOUGH_MACHINES:
        return warning("open files", detail, "raise the limit: ulimit -Hn 1048576, or LimitNOFILE= in the service")
    return ok("open files", detail)


def _process_limit() -> Check:
    limits = dict(_task_limits())
    tightest = min(limits, key=limits.__getitem__)
    machines = limits[tightest] // _TASKS_PER_MACHINE
    detail = f"{limits[tightest]} threads ({tightest}): enough for about {machines} machines"
    if machines < _ENOUGH_MACHINES:
        return warning("processes", detail, f"raise {tightest}")
    return ok("processes", detail)


def _task_limits() -> Iterator[tuple[str, int]]:
    """What bounds the number of threads here: name -> number."""
    for name in ("kernel/pid_max", "kernel/threads-max"):
        yield name.replace("/", "."), int((PROC / "sys" / name).read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY and os.geteuid() != 0:  # root is not bound by it
        yield "ulimit -u", hard
    for hierarchy, _, path in (line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()):
        root = CGROUPS if hierarchy == "0" else CGROUPS / "pids"
        for directory in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            limit = directory / "pids.max"
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                yield str(limit), int(text)
            if directory == root:
                break
