"""The exact contents of cgroup files on version 2, and where trees go, on a made-up cgroup file system."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, MachineFailed, NotPossibleNow, ResourceExhausted
from forkypig.hostd.cgroups import cgroups, hierarchy, v1, v2
from forkypig.hostd.cgroups.cgroups import Cgroups
from forkypig.hostd.cgroups.search import Surroundings, search, whole_disk
from forkypig.model import Limits, Shape

V2_FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.type", "cpu.max", "cpu.weight", "cpu.stat", "memory.max")
V2_FILES += ("memory.current", "memory.stat", "memory.events", "pids.max", "pids.current", "io.max")


class Kernel:
    """A directory that behaves like cgroupfs as far as we use it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "cgroup"
        self.proc = root / "proc"
        self.refused: dict[str, int] = {}  # what a write of this value fails with
        self.systemd = root / "systemd"
        (self.proc / "self").mkdir(parents=True)
        self.root.mkdir()
        mkdir, rmdir = Path.mkdir, Path.rmdir

        def make(path: Path, *args: int, **kwargs: bool) -> None:
            mkdir(path, *args, **kwargs)
            if path.is_relative_to(self.root):
                self.populate(path)

        def remove(path: Path) -> None:
            if path.is_relative_to(self.root):
                if (path / "cgroup.procs").read_text() or any(p.is_dir() for p in path.iterdir()):
                    raise OSError(errno.EBUSY, "busy")
                for file in path.iterdir():
                    file.unlink()
            rmdir(path)

        monkeypatch.setattr(Path, "mkdir", make)
        monkeypatch.setattr(Path, "rmdir", remove)
        for module in (hierarchy, v1, v2, cgroups):
            monkeypatch.setattr(module, "write", self.write)

    def populate(self, directory: Path) -> None:
        for name in V2_FILES:
            (directory / name).touch()
        (directory / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")

    def write(self, path: Path, value: object) -> None:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        if code := self.refused.get(str(value)):
            raise OSError(code, errno.errorcode[code])
        if path.name == "cgroup.subtree_control":
            path.write_text(" ".join({*path.read_text().split(), str(value).removeprefix("+")}))
        else:
            path.write_text(str(value))

    def version_2(self, own: str = "/") -> None:
        self.populate(self.root)
        (self.root / "cgroup.type").unlink()  # the real root has none
        (self.root / "cgroup.procs").write_text("1\n2\n")
        (self.proc / "self/mountinfo").write_text(f"31 23 0:28 / {self.root} rw - cgroup2 cgroup2 rw\n")
        (self.proc / "self/cgroup").write_text(f"0::{own}\n")
        if own != "/":
            (self.root / own[1:]).mkdir(parents=True)
            (self.root / own[1:] / "cgroup.procs").write_text("77\n")

    def find(self, *, is_root: bool = True) -> Cgroups:
        where = Surroundings(self.proc, self.systemd, is_root)
        hierarchies, missing = search("here", where)
        return Cgroups("here", hierarchies, missing, "8:16")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def _contents(directory: Path) -> dict[str, str]:
    return {file.name: text for file in directory.iterdir() if file.is_file() and (text := file.read_text())}


def test_files_of_version_2(kernel: Kernel) -> None:
    kernel.version_2()
    groups = kernel.find()
    assert groups.missing == ()
    assert groups.describe() == "version 2 with cpu, memory, pids, io"
    tree = kernel.root / "forky-here"
    assert not tree.exists()  # looking leaves nothing
    group = groups.make("m-1", Limits(cpus=1.5, memory_mib=600, io_mib_s=20), Shape(), "kvm")
    group.add(4711)
    assert set((kernel.root / "cgroup.subtree_control").read_text().split()) == {"cpu", "io", "memory", "pids"}
    assert set((tree / "cgroup.subtree_control").read_text().split()) == {"cpu", "io", "memory", "pids"}
    found = _contents(tree / "m-1")
    assert found.pop("cgroup.controllers")
    assert found == {
        "cgroup.subtree_control": "memory",
        "cpu.max": "150000 100000",
        "cpu.weight": "100",
        "pids.max": "516",
        "io.max": "8:16 rbps=20971520 wbps=20971520",
    }
    leaf = _contents(tree / "m-1/4711")
    assert (leaf["memory.max"], leaf["cgroup.procs"]) == (str(600 << 20), "4711")
    groups.park(4711)
    assert (tree / "frozen/cgroup.procs").read_text() == "4711"


def test_limits_change(kernel: Kernel) -> None:
    kernel.version_2()
    group = kernel.find().make("m-1", Limits(), Shape(memory_mib=512), "kvm")
    group.add(1)
    tree = kernel.root / "forky-here/m-1"
    assert (tree / "io.max").read_text() == ""  # a write would turn throttling on for the device
    assert (tree / "1/memory.max").read_text() == str((512 + 256 + 8) << 20)
    group.set(Limits(io_mib_s=1, memory_mib=700))
    group.set(Limits(pids=20))
    assert (tree / "io.max").read_text() == "8:16 rbps=max wbps=max"
    assert (tree / "pids.max").read_text() == "20"
    assert (tree / "1/memory.max").read_text() == str((512 + 256 + 8) << 20)
    (tree / "1/memory.stat").write_text(f"anon {300 << 20}\nfile {900 << 20}\nshmem {100 << 20}\n")
    with pytest.raises(NotPossibleNow, match="uses 400 MiB of memory"):
        group.set(Limits(memory_mib=399, pids=30))
    assert (tree / "pids.max").read_text() == "20"  # nothing was changed
    group.set(Limits(memory_mib=400))
    assert (tree / "1/memory.max").read_text() == str(400 << 20)


def test_the_quota_is_lifted_for_a_split(kernel: Kernel) -> None:
    kernel.version_2()
    group = kernel.find().make("m-1", Limits(cpus=0.5), Shape(), "kvm")
    tree = kernel.root / "forky-here/m-1"
    with pytest.raises(RuntimeError, match="split"), group.real_time():
        assert ((tree / "cpu.max").read_text(), (tree / "cpu.weight").read_text()) == ("max 100000", "10000")
        raise RuntimeError("the split failed")
    assert ((tree / "cpu.max").read_text(), (tree / "cpu.weight").read_text()) == ("50000 100000", "100")


def test_usage_of_version_2(kernel: Kernel) -> None:
    kernel.version_2()
    group = kernel.find().make("m-1", Limits(), Shape(), "kvm")
    tree = kernel.root / "forky-here/m-1"
    for pid in (7, 8):
        group.add(pid)
        (tree / str(pid) / "memory.current").write_text("1000\n")
        (tree / str(pid) / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    (tree / "cpu.stat").write_text("usage_usec 2500000\nnr_throttled 4\nthrottled_usec 125000\n")
    (tree / "pids.current").write_text("9\n")
    assert group.usage() == cgroups.Usage(cpu_s=2.5, memory_bytes=2000, pids=9, oom_kills=2, throttled_s=0.125)


def test_a_host_that_refuses(kernel: Kernel) -> None:
    kernel.version_2()
    groups = kernel.find()
    group = groups.make("m-1", Limits(), Shape(), "kvm")
    kernel.refused = {"9": errno.ESRCH, "10": errno.EACCES, "1000 100000": errno.EINVAL}
    group.add(9)  # has ended: passed over
    with pytest.raises(MachineFailed, match="process 10 can't be put into the cgroup of «m-1»"):
        group.add(10)
    groups.park(10)
    with pytest.raises(InvalidRequest, match=r"refuses a limit of «m-1».*0\.001 CPUs"):
        group.set(Limits(cpus=0.001))
    for name in ("../up", "frozen", "", "a/b"):
        with pytest.raises(InvalidRequest, match="can't be a cgroup's name"):
            groups.make(name, Limits(), Shape(), "kvm")
    kernel.refused = {"+memory": errno.ENOSPC}
    with pytest.raises(ResourceExhausted, match="can't make a cgroup for «m-2»"):
        groups.make("m-2", Limits(), Shape(), "kvm")


@pytest.mark.parametrize(
    ("own", "systemd", "is_root", "base"),
    [
        ("/", False, True, ""),
        ("/user.slice/session-1.scope", True, True, ""),  # a session's scope ends with the session
        ("/forky.service/daemons", True, False, "forky.service"),  # delegated, hostd in a subgroup
        ("/lxc/a/init", False, True, "lxc/a"),  # stays below what it was put in
    ],
)
def test_where_the_tree_goes(kernel: Kernel, own: str, systemd: bool, is_root: bool, base: str) -> None:
    kernel.version_2(own)
    if systemd:
        kernel.systemd.mkdir()
    groups = kernel.find(is_root=is_root)
    assert [h.tree for h in groups.hierarchies] == [kernel.root / base / "forky-here"]


def test_a_tree_that_is_there_is_used(kernel: Kernel) -> None:
    kernel.version_2("/a/b")
    (kernel.root / "c/d/forky-here/m-1").mkdir(parents=True)
    groups = kernel.find()
    assert groups.names() == {"m-1"}
    assert groups.hierarchies[0].tree == kernel.root / "c/d/forky-here"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_tree_of_another_user_is_not_believed(kernel: Kernel) -> None:
    kernel.version_2()
    (kernel.root / "user.slice/forky-here").mkdir(parents=True)
    os.chown(kernel.root / "user.slice/forky-here", 1000, 1000)
    assert kernel.find().hierarchies[0].tree == kernel.root / "forky-here"


def test_a_cgroup_with_processes_in_a_container(kernel: Kernel) -> None:
    kernel.version_2()
    (kernel.root / "cgroup.type").write_text("domain\n")  # the root of a namespace, not of all
    groups = kernel.find()
    assert groups.hierarchies == []
    assert len(groups.missing) == 4
    assert "holds processes itself" in groups.missing[0]
    _does_nothing(groups)


def test_a_controller_that_is_refused(kernel: Kernel) -> None:
    kernel.version_2()
    kernel.refused = {"+cpu": errno.EINVAL}
    groups = kernel.find()
    assert groups.hierarchies[0].controllers == {"memory", "pids", "io"}
    assert groups.missing[0].startswith("cpu: ")
    assert "CONFIG_RT_GROUP_SCHED" in groups.missing[0]
    assert groups.describe().startswith("version 2 with memory, pids, io; without cpu: ")
    group = groups.make("m-1", Limits(), Shape(), "kvm")
    with group.real_time():
        pass
    assert group.usage().cpu_s is None


def test_not_allowed_to_write(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.version_2()
    denied: Callable[[Path, int], bool] = lambda path, mode: False  # noqa: E731
    monkeypatch.setattr("os.access", denied)
    groups = kernel.find(is_root=False)
    assert all("Delegate=yes" in line for line in groups.missing)
    _does_nothing(groups)


def test_nothing_mounted(kernel: Kernel) -> None:
    _does_nothing(kernel.find())  # /proc has nothing
    (kernel.proc / "self/mountinfo").write_text("22 1 254:0 / / rw - ext4 /dev/vda rw\n")
    (kernel.proc / "self/cgroup").write_text("")
    groups = kernel.find()
    assert [line.split(":")[0] for line in groups.missing] == ["cpu", "memory", "pids", "io"]
    assert groups.describe().startswith("none: ")
    _does_nothing(groups)


def test_a_mixed_host(kernel: Kernel) -> None:
    """Version 1 with two controllers in one hierarchy, memory in a container's cgroup, the rest in version 2."""
    for name in ("cpu,cpuacct", "memory/inner", "unified"):
        (kernel.root / name).mkdir(parents=True)
    (kernel.root / "unified/cgroup.controllers").write_text("pids\n")
    (kernel.root / "unified/cgroup.type").unlink()
    (kernel.proc / "self/mountinfo").write_text(
        f"32 31 0:29 / {kernel.root}/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        f"33 31 0:30 /box {kernel.root}/memory rw - cgroup cgroup rw,memory\n"
        f"34 31 0:31 / {kernel.root}/unified rw shared:9 - cgroup2 cgroup2 rw\n"
        f"35 31 0:32 / {kernel.root}/systemd rw - cgroup cgroup rw,name=systemd\n"
    )
    (kernel.proc / "self/cgroup").write_text("4:memory:/box/inner\n1:cpu,cpuacct:/\n0::/\n")
    groups = kernel.find()
    assert {(h.version, *sorted(h.controllers), str(h.tree.relative_to(kernel.root))) for h in groups.hierarchies} == {
        (1, "cpu", "cpuacct", "cpu,cpuacct/forky-here"),
        (1, "memory", "memory/inner/forky-here"),
        (2, "pids", "unified/forky-here"),
    }
    assert [line.split(":")[0] for line in groups.missing] == ["io"]


def _does_nothing(groups: Cgroups) -> None:
    group = groups.make("m-1", Limits(cpus=1, memory_mib=100, io_mib_s=5), Shape(), "tcg")
    group.add(1)
    group.set(Limits())
    with group.real_time():
        groups.park(1)
    assert group.usage() == cgroups.Usage(None, None, None, None, None)
    group.remove()
    groups.sweep(set())
    groups.remove_all()


def test_io_limits_are_for_whole_disks(tmp_path: Path) -> None:
    disk = tmp_path / "devices/vda"
    (disk / "vda1").mkdir(parents=True)
    (disk / "dev").write_text("254:0\n")
    (disk / "vda1/dev").write_text("254:1\n")
    (disk / "vda1/partition").write_text("1\n")
    for number, node in (("254:0", disk), ("254:1", disk / "vda1")):
        (tmp_path / number).symlink_to(node)
        assert whole_disk(number, tmp_path) == "254:0"
    with pytest.raises(OSError):
        whole_disk("0:31", tmp_path)
