"""The doctor's findings on a host that lacks something, and on this one."""

import resource
import shutil
from pathlib import Path

import pytest

from forkypig.daemon.settings import Settings
from forkypig.hostd.checks import Check
from forkypig.hostd.doctor import doctor, kernel
from forkypig.qemu.accelerator import Accelerator


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc to write into."""
    directory = tmp_path / "proc"
    (directory / "sys/vm").mkdir(parents=True)
    (directory / "sys/kernel/yama").mkdir(parents=True)
    (directory / "self").mkdir()
    monkeypatch.setattr(doctor, "PROC", directory)
    monkeypatch.setattr(kernel, "PROC", directory)
    return directory


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "not/made/yet", qemu=str(tmp_path / "no-qemu"), accelerator="auto")


async def test_without_qemu_every_other_check_still_runs(settings: Settings) -> None:
    found = named(await doctor.checks(settings, None, None))
    assert found["qemu"].verdict == "failed"
    assert "apt install qemu-system-x86" in found["qemu"].remedy
    assert {"fuse", "tools", "disk", "memory", "cgroups", "kernel", "pagemap", "leftover processes"} < found.keys()
    assert not settings.home.exists()


async def test_whatever_is_not_well_says_what_to_do(settings: Settings) -> None:
    found = await doctor.checks(settings, None, None)
    assert [c.name for c in found if (c.verdict == "ok") != (c.remedy == "")] == []
    assert all(c.detail for c in found)


async def test_tcg_on_purpose_is_well_and_as_a_makeshift_is_not(settings: Settings) -> None:
    tcg = Accelerator("tcg", "max", "TCG, because there is no /dev/kvm")
    assert named(await doctor.checks(settings, None, tcg))["kvm"].verdict == "warning"
    on_purpose = settings.model_copy(update={"accelerator": "tcg"})
    assert named(await doctor.checks(on_purpose, None, tcg))["kvm"].verdict == "ok"


@pytest.mark.parametrize(("free_gib", "verdict"), [(1.9, "failed"), (9.9, "warning"), (10.1, "ok")])
def test_disk_space(settings: Settings, monkeypatch: pytest.MonkeyPatch, free_gib: float, verdict: str) -> None:
    usage = shutil._ntuple_diskusage(0, 0, int(free_gib * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor._disk(settings).verdict == verdict


@pytest.mark.parametrize(("available_kib", "verdict"), [(400_000, "failed"), (1_500_000, "warning"), (9_000_000, "ok")])
def test_memory(settings: Settings, proc: Path, available_kib: int, verdict: str) -> None:
    (proc / "meminfo").write_text(
        f"MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\nPages: 3\n"
    )
    assert doctor._memory(settings).verdict == verdict


@pytest.mark.parametrize(("mode", "verdict"), [("0", "ok"), ("1", "ok"), ("2", "warning")])
def test_overcommit(proc: Path, mode: str, verdict: str) -> None:
    (proc / "sys/vm/overcommit_memory").write_text(f"{mode}\n")
    assert doctor._overcommit().verdict == verdict


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool, path="": None if tool == "mke2fs" else f"/usr/bin/{tool}")
    found = doctor._tools()
    assert (found.verdict, found.remedy) == ("warning", "apt install e2fsprogs")


def test_few_open_files_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    assert doctor._open_files().verdict == "warning"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, resource.RLIM_INFINITY))
    assert doctor._open_files().verdict == "ok"


def test_the_tightest_task_limit_is_a_cgroup_above_ours(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroups = tmp_path / "cgroup"
    (cgroups / "box.slice/inner").mkdir(parents=True)
    (cgroups / "box.slice/pids.max").write_text("300\n")
    (cgroups / "box.slice/inner/pids.max").write_text("max\n")
    monkeypatch.setattr(doctor, "CGROUPS", cgroups)
    (proc / "self/cgroup").write_text("0::/box.slice/inner\n")
    (proc / "sys/kernel/pid_max").write_text("4194304\n")
    (proc / "sys/kernel/threads-max").write_text("190000\n")
    found = doctor._process_limit()
    assert found.verdict == "warning"
    assert found.detail.startswith(f"300 threads ({cgroups}/box.slice/pids.max)")


def test_a_check_that_cannot_look_is_a_finding(proc: Path) -> None:
    found = doctor._look("overcommit", doctor._overcommit)
    assert (found.name, found.verdict) == ("overcommit", "warning")


def test_ptrace_scope_that_forbids_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest of /proc is the real one, seen through links."""
    (tmp_path / "sys/kernel/yama").mkdir(parents=True)
    (tmp_path / "self").symlink_to("/proc/self")
    scope = tmp_path / "sys/kernel/yama/ptrace_scope"
    monkeypatch.setattr(kernel, "PROC", tmp_path)
    for value, uid, verdict in ((0, 1000, "ok"), (1, 0, "ok"), (1, 1000, "failed"), (3, 0, "failed")):
        scope.write_text(f"{value}\n")
        monkeypatch.setattr(kernel.os, "geteuid", lambda uid=uid: uid)
        assert kernel.process_memory().verdict == verdict, (value, uid)


def test_this_kernel_tells_private_pages_from_shared_ones() -> None:
    assert kernel.pagemap().verdict == "ok"
    assert kernel.system_calls().verdict == "ok"
