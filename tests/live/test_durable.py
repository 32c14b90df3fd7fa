"""Snapshots that last: packed in the background, whole whatever dies meanwhile, and no deeper for being many."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkypig.hostd.faults import PACK_STEPS
from forkypig.model import Snapshot
from forkypig.sync import Forky
from tests.live.conftest import Instance, mostly_long, new_instance
from tests.live.test_faults import faulty

_GENERATIONS = 6
_PATIENCE_S = 30.0

# A file of its own and a mark in memory per generation; the sum of all files of before.
_WRITE = (
    "head -c 300000 /dev/urandom > /root/file-{0} && echo {0} > /dev/shm/mark && sync && cat /root/file-* | sha256sum"
)
_READ = "cat /dev/shm/mark; ls /root | grep -c file-; cat /root/file-* | sha256sum"


@pytest.fixture(scope="module")
def forky() -> Iterator[Instance]:
    """An instance that packs soon."""
    instance = new_instance(FORKY_PACK_AFTER_S="0.2", FORKY_SHELLS="0")  # a shell that waits has an overlay too
    try:
        yield instance
    finally:
        instance.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


def _until(holds: Callable[[], bool], forky: Instance) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, forky.explain(forky.run("snapshots"))
        time.sleep(0.1)


def _snapshot(forky: Instance, tag: str) -> Snapshot:
    with Forky(home=forky.home, start=False) as client:
        return next(each for each in client.snapshots() if each.tag == tag)


def _until_packed(forky: Instance, tag: str) -> None:
    _until(lambda: _snapshot(forky, tag).packed, forky)


def _disk_files(forky: Instance, machine: str) -> list[str]:
    """What the machine's QEMU has open of its disk: overlays and raw files, by kind."""
    with Forky(home=forky.home, start=False) as client:
        pid = client.get(machine).info.qemu_pid
    opened = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return sorted(Path(path).name.rpartition(".")[2] for path in opened if path.endswith((".qcow2", "/disk", ".raw")))


def _killed(forky: Instance, module: str) -> bool:
    return _signalled(forky, module, signal.SIGKILL)


def _signalled(forky: Instance, module: str, number: signal.Signals) -> bool:
    """Signals the process of this instance that runs a module of ours; False when there is none."""
    for pid, command in forky.processes().items():
        if module in command:
            os.kill(pid, number)
            return True
    return False


@pytest.fixture(scope="module")
def sums(forky: Instance) -> dict[str, str]:
    """A machine «web» with a packed snapshot per generation; what each generation's files sum up to."""
    forky.ok("run", "--name", "web")
    found = {}
    for generation in range(1, _GENERATIONS + 1):
        tag = f"g{generation}"
        found[tag] = forky.sh("web", _WRITE.format(generation))
        forky.ok("snapshot", "web", "--tag", tag)
        _until_packed(forky, tag)
    return found


def _check(forky: Instance, tag: str, sums: dict[str, str]) -> None:
    """A child of the generation has its memory and its files, and none of those that came later."""
    (child,) = forky.json("fork", tag, "-n", "1")["children"]
    generation = tag.removeprefix("g")
    assert forky.sh(child["name"], _READ).split("\n") == [generation, generation, sums[tag]]
    forky.ok("rm", child["name"])


def test_a_disk_is_one_overlay_over_one_file_whatever_the_depth(forky: Instance, sums: dict[str, str]) -> None:
    _until(lambda: _disk_files(forky, "web") == ["disk", "qcow2"], forky)
    _until(lambda: len(list((forky.home / "disks").iterdir())) == 1, forky)
    assert not list((forky.home / "snapshots").glob("*.devices"))
    assert forky.sh("web", _READ).split("\n")[-1] == sums[f"g{_GENERATIONS}"]
    for tag in ("g1", "g4", "g6"):
        _check(forky, tag, sums)


def test_packer_and_reader_are_killed(forky: Instance, sums: dict[str, str]) -> None:
    forky.sh("web", "head -c 60000000 /dev/urandom > /dev/shm/noise")
    _until(lambda: _signalled(forky, "forkypig.pager.packer", signal.SIGSTOP), forky)
    forky.ok("snapshot", "web", "--tag", "noisy")
    assert not _snapshot(forky, "noisy").packed
    assert _killed(forky, "forkypig.pager.packer")
    assert _killed(forky, "forkypig.pager.reader")
    _check(forky, "g3", sums)
    _until_packed(forky, "noisy")
    _until(lambda: _disk_files(forky, "web") == ["disk", "qcow2"], forky)


@pytest.mark.parametrize("step", mostly_long(PACK_STEPS, always=["pack-record"]))
def test_hostd_is_killed_while_it_packs(forky: Instance, sums: dict[str, str], step: str) -> None:
    faulty(forky)
    hostd = forky.pid("hostd")
    forky.sh("web", f"echo {step} > /dev/shm/step")
    (forky.home / "fault").write_text(f"kill {step}")
    forky.ok("snapshot", "web", "--tag", step)
    _until(lambda: not (forky.home / "fault").exists(), forky)
    faulty(forky)
    assert forky.pid("hostd") != hostd
    _until_packed(forky, step)
    (child,) = forky.json("fork", step, "-n", "1")["children"]
    assert forky.sh(child["name"], "cat /dev/shm/step") == step
    forky.ok("rm", child["name"])
    _until(lambda: _disk_files(forky, "web") == ["disk", "qcow2"], forky)
    assert forky.sh("web", _READ).split("\n")[-1] == sums[f"g{_GENERATIONS}"]


def test_a_reboot(forky: Instance, sums: dict[str, str]) -> None:
    """All processes gone at once: packed snapshots start again, and a machine boots from its disk."""
    forky.sh("web", "echo late > /root/late; sync")
    for pid in forky.processes():
        os.kill(pid, signal.SIGKILL)
    _until(lambda: not forky.processes(), forky)
    for mount in forky.mounts():
        subprocess.run(["umount", "-l", mount.split()[1]], check=True)
    forky.ok("up")
    _check(forky, "g2", sums)
    forky.ok("start", "web")
    # Its memory is its own now and its disk the pager's: while that is away the guest waits.
    forky.sh("web", "echo 3 > /proc/sys/vm/drop_caches")
    forky.kill9("pager")
    read = "cat /root/late; cat /root/file-* | sha256sum"
    assert forky.sh("web", read).split("\n") == ["late", sums[f"g{_GENERATIONS}"]]
    assert not forky.sh("web", "dmesg | grep -i 'i/o error' || true")


def test_a_full_disk_lets_the_snapshot_stay_in_memory_until_there_is_room() -> None:
    forky = new_instance()
    images = (forky.home / "images").readlink()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m,mode=700", "forky-test", str(forky.home)], check=True)
    try:
        (forky.home / "images").symlink_to(images)
        forky.ok("run", "--name", "web")
        forky.sh("web", "head -c 30000000 /dev/urandom > /dev/shm/noise; sha256sum < /dev/shm/noise > /dev/shm/sum")
        status = os.statvfs(forky.home)
        filler = forky.home / "filler"
        filler.write_bytes(bytes(status.f_bavail * status.f_frsize - (8 << 20)))
        forky.ok("snapshot", "web", "--tag", "kept")
        log = forky.home / "logs/hostd.log"
        _until(lambda: "stays in memory for now" in log.read_text(), forky)
        line = next(line for line in log.read_text().splitlines() if "stays in memory for now" in line)
        assert "No space left on device" in line, line
        assert "free some" in line, line
        assert not _snapshot(forky, "kept").packed
        check = "sha256sum < /dev/shm/noise | cmp - /dev/shm/sum && echo same"
        (child,) = forky.json("fork", "kept", "-n", "1")["children"]
        assert forky.sh(child["name"], check) == "same"
        filler.unlink()
        _until_packed(forky, "kept")
        assert forky.sh(child["name"], check) == "same"
        forky.ok("rm", "--all")
        forky.ok("down")
    finally:
        forky.clear()
        subprocess.run(["umount", "-R", "-l", str(forky.home)], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", str(forky.home)], check=False)
