"""Reading how little memory there is."""

import os
from pathlib import Path, PurePosixPath

from forkypig.hostd import pressure
from forkypig.hostd.cgroups import search as cgroup_search
from forkypig.hostd.cgroups.hierarchy import Mount
from forkypig.hostd.cgroups.v2 import V2

_PSI = "some avg10=12.50 avg60=1.00 avg300=0.10 total=3350\nfull avg10=3.25 avg60=0.50 avg300=0.05 total=2190\n"


def test_psi(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    assert pressure.stalls(file) == (0.0, 0.0)
    file.write_text(_PSI)
    assert pressure.stalls(file) == (12.5, 3.25)


def test_this_host() -> None:
    now = pressure.measure()
    assert 0 < now.available_mib < now.total_mib
    used = pressure.cpu_seconds({"self": os.getpid(), "gone": 2**22 + 1})
    assert set(used) == {"self"}
    assert used["self"] > 0


def test_a_command_with_spaces_and_brackets(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/stat").write_text(f"7 (a) b (c) S {' '.join(str(n) for n in range(4, 40))}\n")
    assert pressure.cpu_seconds({"m": 7}, tmp_path) == {"m": (14 + 15) / os.sysconf("SC_CLK_TCK")}


def _meminfo(proc: Path) -> Path:
    proc.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {12 << 20} kB\n")
    return proc


def test_a_container_has_no_more_than_its_own(tmp_path: Path) -> None:
    """On version 1, a service with a limit in a container with a tighter one; what its files take can be had back."""
    proc, mount = _meminfo(tmp_path / "proc"), tmp_path / "memory"
    service = mount / "service"
    service.mkdir(parents=True)
    for group, limit in ((mount, 2 << 30), (service, 3 << 30)):
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "memory.usage_in_bytes").write_text(str(1 << 30))
        (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {256 << 20}\ntotal_active_file 0\n")
    (proc / "self").mkdir()
    (proc / "self/mountinfo").write_text(f"31 23 0:28 / {mount} rw - cgroup cgroup rw,memory\n")
    (proc / "self/cgroup").write_text("4:memory:/service\n")
    around = cgroup_search.around("here", cgroup_search.Surroundings(proc, tmp_path / "no-systemd"))
    assert [group for _, group in around] == [service, mount]
    assert pressure.measure(around, proc) == pressure.Pressure(2048, 2048 - 768, 0.0, 0.0)
    (mount / "memory.limit_in_bytes").write_text(str(0x7FFFFFFFFFFFF000))
    (service / "memory.limit_in_bytes").write_text(str(0x7FFFFFFFFFFFF000))
    assert pressure.measure(around, proc) == pressure.Pressure(16 << 10, 12 << 10, 0.0, 0.0)


def test_a_container_of_version_2(tmp_path: Path) -> None:
    """It stalls by itself, and throttles before it kills."""
    proc, group = _meminfo(tmp_path / "proc"), tmp_path / "group"
    group.mkdir()
    files = {
        "memory.max": "max",
        "memory.high": str(1 << 30),
        "memory.current": str(900 << 20),
        "memory.pressure": _PSI,
    }
    for name, text in files.items():
        (group / name).write_text(text)
    hierarchy = V2(Mount(tmp_path, PurePosixPath("/"), frozenset({"memory"})), group, "here")
    assert pressure.measure([(hierarchy, group)], proc) == pressure.Pressure(1024, 124, 12.5, 3.25)
    (group / "memory.high").write_text("max")
    assert pressure.measure([(hierarchy, group)], proc) == pressure.Pressure(16 << 10, 12 << 10, 0.0, 0.0)
