"""The host's power goes, with the home on a file system that writes nothing by itself; and packs are written anew below
machines that run on them.

What a power cut leaves is what was written to the device: a copy of the file that the loop device stands on, made
while the file system above it is still mounted. Nothing is committed there for five minutes but what is synced.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import FORKY, Instance, new_instance

_OPTIONS = "loop,noatime,commit=300,noauto_da_alloc"
_DEVICE_MIB = 3 << 10  # sparse
_PATIENCE_S = 60.0
# The same bytes in whatever machine: pages that two snapshots have in common.
_NOISE = "import random; open('/dev/shm/{0}', 'wb').write(random.Random({1}).randbytes({2} << 20))"
_SUM = "sha256sum < /dev/shm/common"


class Device:
    """The disk that the home is on."""

    def __init__(self, forky: Instance, directory: Path) -> None:
        self._forky, self._directory = forky, directory
        self._file = directory / "disk"
        with self._file.open("wb") as file:
            file.truncate(_DEVICE_MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(self._file)], check=True)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", _OPTIONS, str(self._file), str(self._forky.home)], check=True)

    def cut_the_power(self) -> None:
        """All processes are gone, and all that was not on the disk; then the computer is there again."""
        pids = self._forky.processes()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        after = self._directory / "after"
        subprocess.run(["cp", "--sparse=always", str(self._file), str(after)], check=True)
        deadline = time.monotonic() + _PATIENCE_S
        while self._forky.processes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.unmount()
        after.replace(self._file)
        self.mount()

    def unmount(self) -> None:
        home = str(self._forky.home)
        for mount in reversed(self._forky.mounts()):
            if mount.split()[1] != home:
                subprocess.run(["umount", "-l", mount.split()[1]], check=True)
        deadline = time.monotonic() + _PATIENCE_S  # what is killed gives its files back a little later
        while subprocess.run(["umount", home], check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture(scope="module")
def device() -> Iterator[tuple[Instance, Device]]:
    forky = new_instance(FORKY_SHELLS="0")
    images = (forky.home / "images").readlink()
    directory = Path(f"{forky.home}-disk")
    directory.mkdir()
    try:
        made = Device(forky, directory)
        made.mount()
        (forky.home / "images").symlink_to(images)
        os.sync()  # this is the last time
        yield forky, made
        forky.ok("rm", "--all")
        forky.ok("down")
    finally:
        forky.clear()
        subprocess.run(["umount", "-R", "-l", str(forky.home)], check=False)
        shutil.rmtree(directory)
        subprocess.run(["rm", "-rf", "--one-file-system", str(forky.home)], check=False)


def _comes_back(forky: Instance, machine: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while forky.json("inspect", machine)["state"] != "running":
        assert time.monotonic() < deadline, forky.explain(forky.run("ps"))
        time.sleep(0.2)


def test_what_was_reported_is_there_after_a_power_cut(device: tuple[Instance, Device]) -> None:
    forky, disk = device
    forky.ok("run", "--name", "web", "--memory", "256M", "--restart", "always")
    forky.sh("web", "echo first > /dev/shm/mark; echo first > /root/mark; sync")
    forky.ok("snapshot", "web", "--tag", "first", "--wait")
    forky.sh("web", "echo second > /dev/shm/mark; echo second > /root/mark")
    forky.ok("snapshot", "web", "--tag", "second", "-m", "the last word", "--wait")
    disk.cut_the_power()
    forky.ok("up")
    _comes_back(forky, "web")  # from the last one, not from one before
    assert forky.sh("web", "cat /dev/shm/mark /root/mark") == "second\nsecond"
    assert [each["tag"] for each in forky.json("log", "web")[:2]] == ["second", "first"]
    forky.ok("fork", "first", "--name", "again")
    assert forky.sh("again-1", "cat /dev/shm/mark /root/mark") == "first\nfirst"

    forky.sh("again-1", "echo asleep > /dev/shm/mark")
    forky.ok("tag", "first", "oldest", "--force")
    forky.ok("hibernate", "again-1")
    disk.cut_the_power()
    forky.ok("up")
    assert forky.json("inspect", "again-1")["state"] == "hibernated"
    forky.ok("wake", "again-1")
    assert forky.sh("again-1", "cat /dev/shm/mark /root/mark") == "asleep\nfirst"
    assert {each["tag"] for each in forky.json("tag")} >= {"oldest", "second"}
    assert "all is well" in forky.ok("fsck", "--deep")


def test_what_a_guest_synced_outlasts_a_power_cut_right_after_its_fork(device: tuple[Instance, Device]) -> None:
    """It boots from its disk then, since nothing of it was kept."""
    forky, disk = device
    forky.ok("run", "--name", "base", "--memory", "256M", "--restart", "always")
    forky.sh("base", "echo before > /root/mark; sync")
    forky.ok("fork", "base")
    forky.sh("base", "echo after >> /root/mark; sync")
    disk.cut_the_power()
    forky.ok("up")
    _comes_back(forky, "base")
    assert forky.sh("base", "cat /root/mark") == "before\nafter"


def test_packs_are_written_anew_below_running_machines(device: tuple[Instance, Device]) -> None:
    """Two machines have pages in common, stored once, in the pack of one that goes with all else that it holds."""
    forky, _ = device
    forky.ok("run", "--name", "one", "--memory", "256M")
    forky.ok("run", "--name", "two", "--memory", "256M")
    forky.sh("one", f'python3 -c "{_NOISE.format("common", 1, 12)}; {_NOISE.format("own", 2, 20)}"')
    others = _packs(forky)
    forky.ok("snapshot", "one", "--tag", "going", "--wait")
    theirs = _packs(forky) - others
    forky.sh("two", f'python3 -c "{_NOISE.format("common", 1, 12)}"')
    forky.ok("snapshot", "two", "--tag", "staying", "--wait")
    want = forky.sh("two", _SUM)
    forky.ok("fork", "staying", "--name", "before")  # it has not read any of it yet
    forky.ok("rm", "one", "going")
    _forget_pages(forky)
    for _ in range(2):  # at whatever moment its process is killed
        _killed_collection(forky)
        assert forky.sh("two", _SUM) == want
    forky.ok("gc")
    assert theirs
    assert not theirs & _packs(forky)
    _forget_pages(forky)
    assert forky.sh("before-1", _SUM) == want
    assert forky.sh("two", _SUM) == want
    assert "all is well" in forky.ok("fsck", "--deep")


def _packs(forky: Instance) -> set[str]:
    return {path.name for path in (forky.home / "store/packs").iterdir()}


def _forget_pages(forky: Instance) -> None:
    """What no guest has mapped is read again: from where the chunks are now."""
    for memory in (forky.home / "memory").glob("*/memory"):
        fd = os.open(memory, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _killed_collection(forky: Instance) -> None:
    running = subprocess.Popen(
        forky.inside(FORKY, "gc"),
        env=forky.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + _PATIENCE_S
    while running.poll() is None and time.monotonic() < deadline:
        workers = [pid for pid, command in forky.processes().items() if "forkypig.archive" in command]
        if workers:
            time.sleep(random.uniform(0.0, 0.6))
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    running.wait(_PATIENCE_S)
