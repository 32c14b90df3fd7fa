"""kill -9 and full disks at every step of packing and collecting: what was reported stays, and only rubbish besides."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from forkypig.chunks import faults, manifest_file
from forkypig.chunks.check import check
from forkypig.chunks.collect import collect
from forkypig.chunks.store import Store
from forkypig.errors import ResourceExhausted
from tests.chunks_rig import assert_readable, pages, save_snapshot, snapshot_id
from tests.victims import PROCESSES, exit_code, killed_at, start


def memory(number: int, count: int = 60) -> np.ndarray:
    """Half of it is that of every snapshot."""
    return np.concatenate([pages(0, count), pages(number, count)])


def save(directory: Path, number: int) -> None:
    save_snapshot(Store.open(directory), number, memory(number))


def collect_all(directory: Path) -> None:
    collect(Store.open(directory))


def assert_clean(store: Store, numbers: list[int]) -> None:
    """After a collection these snapshots are there, whole, and nothing else."""
    done = collect(store)
    assert done.problems == ()
    assert check(store).problems == ()
    assert manifest_file.saved(store) == [snapshot_id(number) for number in numbers]
    for number in numbers:
        assert_readable(store.directory, number, memory(number))
    names = [path.name for path in store.directory.rglob("*.part")]
    assert names == []
    again = collect(store)
    assert (again.chunks_removed, again.freed_bytes) == (0, 0)


@pytest.mark.parametrize("step", faults.WRITE_STEPS)
def test_killed_while_packing(tmp_path: Path, step: str) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, memory(1))
    assert killed_at(step, save, tmp_path, 2)
    assert_readable(tmp_path, 1, memory(1))
    there = [1, 2] if step == "manifest-renamed" else [1]
    save_snapshot(store, 3, memory(3))  # the dead one's lock and leftovers are in nobody's way
    assert_clean(store, [*there, 3])


@pytest.mark.parametrize("step", faults.COLLECT_STEPS)
def test_killed_while_collecting(tmp_path: Path, step: str) -> None:
    store = Store.open(tmp_path)
    for number in (1, 2, 3, 4):
        save_snapshot(store, number, memory(number))
    for number in (1, 3):
        manifest_file.remove(store, snapshot_id(number))
    assert killed_at(step, collect_all, tmp_path)
    for number in (2, 4):
        assert_readable(tmp_path, number, memory(number))
    save_snapshot(store, 5, memory(5))
    assert_clean(store, [2, 4, 5])


def work(directory: Path, report: Connection, first: int) -> None:
    """Saves a snapshot, says so, removes an old one, collects; and again."""
    store = Store.open(directory)
    for number in range(first, first + 1000):
        save_snapshot(store, number, memory(number))
        report.send(number)
        if number > 3:
            manifest_file.remove(store, snapshot_id(number - 3))
            collect(store)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Not only between the steps that we know of."""
    random.seed(4)

    first = 1
    for _ in range(8):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = start(work, tmp_path, sender, first)
        sender.close()
        assert receiver.poll(60), "it does nothing"
        time.sleep(random.uniform(0.0, 0.2))
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reported = 0
        with contextlib.suppress(EOFError):
            while True:
                reported = receiver.recv()
        store = Store.open(tmp_path)
        for snapshot in manifest_file.saved(store):
            assert_readable(tmp_path, int(snapshot[2:], 16), memory(int(snapshot[2:], 16)))
        assert not reported or snapshot_id(reported) in manifest_file.saved(store)
        first = max([first, *(int(snapshot[2:], 16) for snapshot in manifest_file.saved(store))]) + 1
    assert check(store).problems == ()
    assert first > 8


@contextlib.contextmanager
def no_file_longer_than(length: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("length", [0, 30, 64, 10_000, 100_000, -300, -10])
def test_no_room_for_the_pack(tmp_path: Path, length: int) -> None:
    """The file can't be longer than `length`, or misses so much of its full length."""
    store = Store.open(tmp_path / "other")
    save_snapshot(store, 2, memory(2))
    full = store.pack(1).size_bytes
    store = Store.open(tmp_path / "store")
    with no_file_longer_than(length if length >= 0 else full + length), pytest.raises(ResourceExhausted, match="free"):
        save_snapshot(store, 2, memory(2))
    assert list((tmp_path / "store/packs").iterdir()) == list((tmp_path / "store/manifests").iterdir()) == []
    save_snapshot(store, 2, memory(2))
    assert_clean(store, [2])


def test_no_room_for_the_manifest(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, memory(1))
    with contextlib.ExitStack() as limit:
        faults.listen(lambda step: limit.enter_context(no_file_longer_than(50)) if step == "packs-synced" else None)
        try:
            with pytest.raises(ResourceExhausted):
                save_snapshot(store, 2, memory(2))
        finally:
            faults.listen(None)
    assert_clean(store, [1])


def test_no_room_to_collect_into(tmp_path: Path) -> None:
    """What needs no room is freed all the same, and the rest stays as it is."""
    store = Store.open(tmp_path)
    for number in (1, 2, 3):
        save_snapshot(store, number, memory(number))
    with store.writer() as writer:
        writer.add(pages(9, 50))  # a pack that nothing needs
        writer.commit()
    manifest_file.remove(store, snapshot_id(1))
    with no_file_longer_than(5000):
        done = collect(store)
    assert (done.packs_removed, done.packs_rewritten, len(done.problems)) == (1, 0, 1)
    assert_clean(store, [2, 3])


@pytest.mark.skipif("os.geteuid() != 0", reason="mounting takes root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "forky-test", str(tmp_path)], check=True)
    try:
        store = Store.open(tmp_path)
        numbers = []
        with pytest.raises(ResourceExhausted, match="no room to write"):
            for number in range(1, 50):
                save_snapshot(store, number, memory(number))
                numbers.append(number)
        assert numbers
        assert_clean(store, numbers)
        manifest_file.remove(store, snapshot_id(numbers.pop()))
        collect(store)
        save_snapshot(store, 50, memory(50))
        assert_clean(store, [*numbers, 50])
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_fresh_store_is_opened_by_many_at_once(tmp_path: Path) -> None:
    processes = [start(Store.open, tmp_path / "store") for _ in range(8)]
    assert [exit_code(process) for process in processes] == [0] * 8
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["key-id", "manifests", "packs"]
