"""Limits hold: real cgroups of this host, whatever version, with small processes in them."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkypig.errors import NotPossibleNow
from forkypig.hostd.cgroups.cgroups import Cgroups, Group
from forkypig.hostd.cgroups.hierarchy import groups_below, processes, remove
from forkypig.model import Limits, Shape
from forkypig.qemu import priority

SHAPE = Shape(memory_mib=128)

# Each waits for a line before it does anything of weight, so that it is in its group by then.
SPIN = "input()\nwhile True: pass"
WAIT = "print('here', flush=True)\ninput()"
ALLOCATE = """
import sys
for line in sys.stdin:
    held = bytearray(b'x') * (int(line) << 20)
    print('held', flush=True)
"""
FORK_BOMB = """
import os, time
input()
made = 0
try:
    for _ in range(50):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except BlockingIOError:
    pass
print(made, flush=True)
input()
"""


class Rig:
    """Groups of a random instance, and processes that end with the test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.instance = f"test-{secrets.token_hex(4)}"
        self.groups = self.find()
        self.processes: list[subprocess.Popen[str]] = []

    def find(self) -> Cgroups:
        return Cgroups.find(self.instance, self.home)

    def make(self, name: str = "m-1", **limits: float) -> Group:
        return self.groups.make(name, Limits(**limits), SHAPE, "kvm")  # type: ignore[arg-type]

    def start(self, code: str, group: Group | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        if group is not None:
            group.add(process.pid)
        return process

    def file(self, name: str, *names: str) -> str:
        """The contents of a file of a group, by the name that it has in one of the versions."""
        for hierarchy in self.groups.hierarchies:
            for path in (hierarchy.tree / name / file for file in names):
                if path.exists():
                    return path.read_text()
        raise AssertionError(f"none of {names} in {name}")

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def trees(self) -> list[Path]:
        return [h.tree for h in self.groups.hierarchies if h.tree.exists()]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    try:
        if lacking := [line for line in rig.groups.missing if not line.startswith("io:")]:
            pytest.skip(f"this host has no cgroups for tests: {lacking[0]}")
        yield rig
    finally:
        rig.end()
        rig.groups.remove_all()
    assert rig.trees() == []


def say(process: subprocess.Popen[str], line: object = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def first_to_go(process: subprocess.Popen[str]) -> bool:
    """Whether the kernel would end it before others when memory is out."""
    return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) > 0


def held_back_s(group: Group) -> float:
    found = group.usage().throttled_s
    assert found is not None
    return found


def test_cpu(rig: Rig) -> None:
    group = rig.make(cpus=0.05)
    say(rig.start(SPIN, group))
    wait_for(lambda: held_back_s(group) > 0)
    used_s = group.usage().cpu_s
    assert used_s is not None and used_s > 0
    group.set(Limits(cpus=4))
    assert rig.file("m-1", "cpu.cfs_quota_us", "cpu.max").split()[0] == "400000"


def test_threads(rig: Rig) -> None:
    bombed, other = rig.start(FORK_BOMB, rig.make(pids=20)), rig.start(FORK_BOMB, rig.make("m-2"))
    for process in (bombed, other):
        say(process)
    assert hear(bombed) == "19"
    assert hear(other) == "50"
    assert rig.make(pids=20).usage().pids == 20


def test_memory(rig: Rig) -> None:
    group, other = rig.make(memory_mib=64), rig.make("m-2", memory_mib=64)
    greedy, modest = rig.start(ALLOCATE, group), rig.start(ALLOCATE, other)
    say(greedy, 200)
    assert greedy.wait(20) == -signal.SIGKILL
    say(modest, 40)
    assert hear(modest) == "held"
    assert group.usage().oom_kills == 1
    usage = other.usage()
    assert usage.oom_kills == 0
    assert usage.memory_bytes is not None and usage.memory_bytes > 40 << 20
    with pytest.raises(NotPossibleNow, match="can't be 30 MiB"):
        other.set(Limits(memory_mib=30))
    say(modest, 1)
    assert hear(modest) == "held"


def test_a_snapshot_takes_nothing_from_its_successor(rig: Rig) -> None:
    """The old process keeps its memory when it is parked; in one group both would not fit."""
    group = rig.make(memory_mib=64)
    old, successor = rig.start(ALLOCATE, group), rig.start(ALLOCATE, group)
    say(old, 45)
    assert hear(old) == "held"
    assert first_to_go(old) and first_to_go(successor)
    os.kill(old.pid, signal.SIGSTOP)
    rig.groups.park(old.pid)
    assert not first_to_go(old)  # what stands on the snapshot would lose its ground
    for hierarchy in rig.groups.hierarchies:
        if "cpuacct" not in hierarchy.controllers or "cpu" in hierarchy.controllers:
            assert hierarchy.group_of(old.pid) == hierarchy.tree / "frozen"
    say(successor, 45)
    assert hear(successor) == "held"
    usage = group.usage()
    assert usage.memory_bytes is not None and 45 << 20 < usage.memory_bytes < 64 << 20
    assert usage.oom_kills == 0
    group.add(old.pid)  # the split was undone
    assert first_to_go(old)
    os.kill(old.pid, signal.SIGCONT)
    for hierarchy in rig.groups.hierarchies:
        found = hierarchy.group_of(old.pid)
        assert found is not None and found.is_relative_to(hierarchy.tree / "m-1")


def test_disk(rig: Rig) -> None:
    if rig.groups.device is None:
        pytest.skip(rig.groups.missing[-1])
    group = rig.make(io_mib_s=7)
    read = ("blkio.throttle.read_bps_device", "io.max")
    write = ("blkio.throttle.write_bps_device", "io.max")
    for files in (read, write):
        found = rig.file("m-1", *files)
        assert found.startswith(rig.groups.device)
        assert str(7 << 20) in found
    group.set(Limits())
    assert [rig.file("m-1", *files) for files in (read, write)] == ["", ""]


def test_nothing_stays_of_a_machine(rig: Rig) -> None:
    group = rig.make()
    processes = [rig.start(ALLOCATE, group) for _ in range(3)]
    for process in processes:
        say(process, 30)
        assert hear(process) == "held"
    for process in processes:
        process.kill()  # they are still exiting when the group is to go
    group.remove()
    assert rig.groups.names() == set()


def test_a_group_that_can_not_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkypig.hostd.cgroups.cgroups._REMOVE_TIMEOUT_S", 0.05)
    group = rig.make()
    rig.start(WAIT, group)
    group.remove()
    assert rig.groups.names() == {"m-1"}


def test_another_hostd_takes_over(rig: Rig) -> None:
    first = rig.make(cpus=0.05, pids=30)
    process = rig.start(SPIN, first)
    say(process)
    wait_for(lambda: held_back_s(first) > 0)
    second = rig.find()
    assert second.names() == {"m-1"}
    group = second.make("m-1", Limits(cpus=0.05, pids=30), SHAPE, "kvm")
    group.add(process.pid)
    assert group.usage().pids == 1
    assert held_back_s(group) > 0
    process.kill()
    process.wait()
    group.remove()
    assert rig.groups.names() == set()


def test_sweep(rig: Rig) -> None:
    for name in ("kept", "gone", "inhabited"):
        rig.make(name)
    rig.start(WAIT, rig.make("inhabited"))
    rig.groups.sweep({"kept"})
    assert rig.groups.names() == {"kept", "inhabited"}


_RATION_US = 1000


@pytest.fixture
def small_rations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowances of real time that the host has left whatever other machines split meanwhile."""
    monkeypatch.setattr("forkypig.hostd.cgroups.v1.SPLIT_RT_US", _RATION_US)


@pytest.mark.usefixtures("small_rations")
async def test_a_split_in_a_machine_that_used_up_its_quota(rig: Rig) -> None:
    group = rig.make(cpus=0.01)
    spinning, splitting = rig.start(SPIN), rig.start(WAIT)
    assert hear(splitting) == "here"  # Python's start takes seconds with this quota
    for process in (spinning, splitting):
        group.add(process.pid)
    say(spinning)
    wait_for(lambda: held_back_s(group) > 0)
    with group.real_time():
        assert rig.file("m-1", "cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
        with priority.during_split([splitting.pid], []):
            policy = os.sched_getscheduler(splitting.pid)
            if rig.groups.hierarchies[0].version == 1:  # version 2 has no allowances to give
                assert policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
        assert os.sched_getscheduler(splitting.pid) == os.SCHED_OTHER
    assert rig.file("m-1", "cpu.cfs_quota_us", "cpu.max").split()[0] == "1000"
    before_s = held_back_s(group)
    wait_for(lambda: held_back_s(group) > before_s)


def _allowances(rig: Rig) -> list[int]:
    files = [h.tree / below / "cpu.rt_runtime_us" for h in rig.groups.hierarchies for below in ("", "m-1", "m-2")]
    return [int(file.read_text()) for file in files if file.exists()]


@pytest.mark.usefixtures("small_rations")
async def test_allowances_of_real_time_are_given_back_after_a_period(rig: Rig) -> None:
    """Not at once: what a group used is forgotten only while it has an allowance."""
    one, two = rig.make("m-1"), rig.make("m-2")
    if not (before := _allowances(rig)):
        pytest.skip("this kernel does not ration real time")
    assert before == [0, 0, 0]
    with one.real_time():
        assert _allowances(rig) == [_RATION_US, _RATION_US, 0]
        with two.real_time():
            assert _allowances(rig) == [2 * _RATION_US, _RATION_US, _RATION_US]
    with one.real_time():  # again at once
        assert _allowances(rig) == [2 * _RATION_US, _RATION_US, _RATION_US]
        await _until(lambda: _allowances(rig) == [_RATION_US, _RATION_US, 0])
    assert _allowances(rig) == [_RATION_US, _RATION_US, 0]
    await _until(lambda: _allowances(rig) == [0, 0, 0])


async def test_more_splits_than_there_are_allowances(rig: Rig) -> None:
    with contextlib.ExitStack() as splits:
        for number in range(1, 8):
            splits.enter_context(rig.make(f"m-{number}").real_time())
        assert rig.file("m-7", "cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
    await _until(lambda: set(_allowances(rig)) <= {0})


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_hostd_that_died_in_a_split(rig: Rig) -> None:
    died = rig.make(cpus=0.5).real_time()
    died.__enter__()
    assert rig.file("m-1", "cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
    second = rig.find()
    second.make("m-1", Limits(cpus=0.5), SHAPE, "kvm")
    second.sweep({"m-1"})
    assert rig.file("m-1", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert set(_allowances(rig)) <= {0}


def test_processes_can_not_leave(rig: Rig) -> None:
    """Without root nobody writes cgroup files, and what a process starts is where it is."""
    group = rig.make()
    targets = [str(h.base / "cgroup.procs") for h in rig.groups.hierarchies]
    code = f"""
import os
input()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
if os.fork() == 0:
    out = []
    for path in {targets!r}:
        try:
            open(path, 'w').write('0')
            out.append(path)
        except PermissionError:
            pass
    print('left', out, flush=True)
    input()
os.wait()
"""
    process = rig.start(code, group)
    say(process)
    assert hear(process) == "left []"
    assert group.usage().pids == 2


def test_a_process_that_has_ended(rig: Rig) -> None:
    group = rig.make()
    process = rig.start("")
    process.wait()
    group.add(process.pid)
    rig.groups.park(process.pid)
    group.remove()
    assert rig.groups.names() == set()


def test_removal_knows_what_is_busy(rig: Rig) -> None:
    group = rig.make()
    process = rig.start(WAIT, group)
    hierarchy = next(h for h in rig.groups.hierarchies if "memory" in h.controllers)
    assert remove([hierarchy.tree / "m-1"]) == [hierarchy.tree / "m-1"]
    (leaf,) = groups_below(hierarchy.tree / "m-1")
    assert processes(leaf) == [process.pid]
