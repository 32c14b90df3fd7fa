"""The holder dies and another goes on with its mount: who faults meanwhile waits, and nothing else is seen of it."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forkypig.chunks.crypt import Key
from forkypig.errors import HostUnreachable
from forkypig.model.ids import SnapshotId, new_snapshot_id
from forkypig.pager import holder as holding
from forkypig.v1 import pager_pb2
from tests.component.pager_rig import PAGE, Model, Rig, child_of, drop_cache, running_pager

pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="FUSE with allow_other needs root")
SIZE = 4 * 2**20
FROZEN, PACKED = pager_pb2.PagerSnapshot.STATE_FROZEN, pager_pb2.PagerSnapshot.STATE_PACKED


async def _kill_holder(rig: Rig, but: int = 0) -> int:
    """Kills the holder of the moment, another than `but`; returns its pid."""
    deadline = time.monotonic() + 60
    while (holder := rig.holder_pid) in (0, but):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    os.kill(holder, signal.SIGKILL)
    return holder


async def _bind(rig: Rig, snapshot: SnapshotId) -> None:
    """By the next holder, which answers faults a moment before it answers calls."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return await rig.client.bind(snapshot)
        except HostUnreachable:
            assert time.monotonic() < deadline


async def test_machines_on_packed_and_frozen_memory_outlive_holders() -> None:
    async with running_pager() as rig:
        model = Model(SIZE, seed=3)
        first = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(model.scribble, first, 30)
        root = await rig.split(first, None, SIZE)
        expected = {root: bytes(model.data)}
        await rig.pack(root)
        second = await asyncio.to_thread(rig.guest, root, SIZE)
        await asyncio.to_thread(model.scribble, second, 10)
        child = await rig.split(second, root, SIZE)
        expected[child] = bytes(model.data)
        guests = {snapshot: await asyncio.to_thread(rig.guest, snapshot, SIZE) for snapshot in expected}
        ended = asyncio.Event()

        async def machine(snapshot: str) -> float:
            """Faults all over its memory and compares; returns the longest wait in seconds."""
            places, longest = random.Random(snapshot), 0.0
            while not ended.is_set():
                offset = places.randrange(SIZE // PAGE - 8) * PAGE
                await asyncio.to_thread(drop_cache, rig.file(root.__class__(snapshot)))
                began = time.monotonic()
                data = await rig.content(root.__class__(snapshot), offset, 8 * PAGE)
                assert data == expected[root.__class__(snapshot)][offset : offset + 8 * PAGE]
                read = await asyncio.to_thread(guests[root.__class__(snapshot)].read, offset, PAGE)
                assert read == data[:PAGE]
                longest = max(longest, time.monotonic() - began)
            return longest

        machines = [asyncio.create_task(machine(snapshot)) for snapshot in expected]
        killed = 0
        for _ in range(3):
            await asyncio.sleep(0.5)
            killed = await _kill_holder(rig, killed)
        await asyncio.sleep(0.5)
        while not rig.holder_pid:
            await asyncio.sleep(0.05)
        ended.set()
        assert max(await asyncio.wait_for(asyncio.gather(*machines), 30)) < 20
        deadline = time.monotonic() + 60
        while (await rig.state(root), await rig.state(child)) != (PACKED, FROZEN):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert "read failed" not in rig.log()
        await rig.pack(child)  # all of it works on


async def test_a_read_that_waits_for_bind_is_answered_by_the_successor() -> None:
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, 0, b"before")
        snapshot = await rig.split(guest, None, SIZE)
        other = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(other.write, 0, b"later")
        waits = new_snapshot_id()
        await rig.client.reserve(waits, SIZE, None, other.pid, other.address)
        reader = asyncio.create_task(rig.content(waits, 0, 5))
        await asyncio.to_thread(rig.waits_for, waits)
        await _kill_holder(rig)
        assert await rig.content(snapshot, 0, 6) == b"before"
        assert not reader.done()
        other.freeze()
        await _bind(rig, waits)
        assert await reader == b"later"


# A thread of the holder pushes a page at SIGUSR1, as when a machine starts: what the snapshot has there, as the push
# may get through before the reader has copied the page.
_PUSH = """
import gc, pathlib, signal, sys, threading

def push(number, frame):
    fuse = sys.modules["forkypig.pager.fuse"]
    gc.unfreeze()  # what it had before it served is there again
    [connection] = [each for each in gc.get_objects() if isinstance(each, fuse.Connection)]
    node = int(pathlib.Path(__file__).with_name("node").read_text())
    threading.Thread(target=connection.store, args=(node, 0, b"later" + bytes(4091)), daemon=True).start()

if "forkypig.pager.holder" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, push)
"""


async def test_a_holder_that_is_killed_as_it_pushes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't end before a read is answered that only its successor can answer."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(_PUSH)
    async with running_pager() as rig:
        other = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(other.write, 0, b"later")
        waits = new_snapshot_id()
        await rig.client.reserve(waits, SIZE, None, other.pid, other.address)
        reader = asyncio.create_task(rig.content(waits, 0, 5))
        await asyncio.to_thread(rig.waits_for, waits)
        (tmp_path / "node").write_text(str((await asyncio.to_thread(rig.file(waits).stat)).st_ino))
        killed = rig.holder_pid
        os.kill(killed, signal.SIGUSR1)
        await _until(lambda: "D" in _states(killed))
        os.kill(killed, signal.SIGKILL)
        await _until(lambda: _states(killed)[:1] == ["Z"])
        other.freeze()
        await _until(lambda: rig.holder_pid not in (0, killed))
        assert "D" in _states(killed)  # still
        await _bind(rig, waits)
        assert await asyncio.wait_for(reader, 20) == b"later"
        await _until(lambda: not _states(killed))


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def _states(pid: int) -> list[str]:
    """Of the threads that are left of a process, its first one ahead; a process that nobody has buried has none."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        states = [
            (tasks / task / "stat").read_text().rpartition(")")[2].split()[0] for task in sorted(os.listdir(tasks))
        ]
    except OSError:
        return []
    return [] if states == ["Z"] else states


async def test_keepers_die_and_nobody_notices() -> None:
    """The holder serves on and starts the next keeper, which keeps it, and the holder after it."""
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, 0, b"frozen")
        snapshot = await rig.split(guest, None, SIZE)
        child = await asyncio.to_thread(rig.guest, snapshot, SIZE)
        waits = new_snapshot_id()
        other = await asyncio.to_thread(rig.guest, None, SIZE)
        await rig.client.reserve(waits, SIZE, None, other.pid, other.address)
        reader = asyncio.create_task(rig.content(waits, 0, 5))
        holder = rig.holder_pid
        for generation in range(2):  # the second is no child of whoever watches it
            await rig.kill_keeper()
            assert await asyncio.to_thread(child.read, generation * PAGE, 1) == (b"f" if generation == 0 else b"\0")
            await rig.next_keeper()
            assert (await rig.client.status()).pager.pid == holder
        await asyncio.to_thread(drop_cache, rig.file(snapshot))
        os.kill(holder, signal.SIGKILL)
        assert await rig.content(snapshot, 0, 6) == b"frozen"
        other.freeze()
        await _bind(rig, waits)
        assert await reader == bytes(5)
        assert rig.holder_pid != holder


async def test_under_systemd_the_next_keeper_is_systemds() -> None:
    """Or two would be started, and systemd's could lose again and again."""
    async with running_pager(by_systemd=True) as rig:
        holder = rig.holder_pid
        await rig.kill_keeper()
        await asyncio.sleep(holding._NEXT_KEEPER_S + 1.0)
        assert rig.keeper_pid == 0
        assert (await rig.client.status()).pager.pid == holder
        await rig.client.__aexit__(None, None, None)
        await rig.start(by_systemd=True)
        await rig.next_keeper()
        assert (await rig.client.status()).pager.pid == holder == rig.holder_pid


async def test_a_spoilt_config_ends_nobody() -> None:
    """It may be written while all runs; who goes on for another does not read it."""
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, 0, b"frozen")
        snapshot = await rig.split(guest, None, SIZE)
        (rig.home / "config.toml").write_text("this is not = [toml")
        holder = await _kill_holder(rig)
        assert await rig.content(snapshot, 0, 6) == b"frozen"
        await rig.kill_keeper()
        await rig.next_keeper()
        await _kill_holder(rig, holder)
        await asyncio.to_thread(drop_cache, rig.file(snapshot))
        assert await rig.content(snapshot, 0, 6) == b"frozen"
        deadline = time.monotonic() + 60
        while await rig.state(snapshot) != FROZEN:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_the_keys_file_may_go_while_machines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on has the key from the one before; it is in nobody's environment or command line."""
    file = tmp_path / "key"
    secret = Key.create(file).secret.hex().encode()
    monkeypatch.setenv("FORKY_STORE_KEY", str(file))
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, 0, b"packed")
        snapshot = await rig.split(guest, None, SIZE)
        await rig.pack(snapshot)
        file.unlink()
        await rig.kill_keeper()
        await rig.next_keeper()
        await _kill_holder(rig)
        await asyncio.to_thread(drop_cache, rig.file(snapshot))
        assert await rig.content(snapshot, 0, 6) == b"packed"
        machine = await asyncio.to_thread(rig.guest, snapshot, SIZE)
        await asyncio.to_thread(machine.write, 0, b"later")
        later = await rig.split(machine, snapshot, SIZE)
        await rig.pack(later)
        for pid in (rig.keeper_pid, rig.holder_pid, await rig.reader_pid(), child_of(rig.holder_pid, "pager.packer")):
            for name in ("environ", "cmdline"):
                assert secret not in Path(f"/proc/{pid}/{name}").read_bytes()


async def test_what_was_forgotten_is_not_taken_over() -> None:
    async with running_pager() as rig:
        first = await asyncio.to_thread(rig.guest, None, SIZE)
        root = await rig.split(first, None, SIZE)
        machine = await asyncio.to_thread(rig.guest, root, SIZE)
        undone = new_snapshot_id()
        await rig.client.reserve(undone, SIZE, root, machine.pid, machine.address)
        await rig.client.forget(undone)  # the fork was undone, and the machine runs on
        await _kill_holder(rig)
        assert await rig.content(root) == bytes(SIZE)
        deadline = time.monotonic() + 60
        while await rig.state(root) != FROZEN:
            assert time.monotonic() < deadline
        assert await rig.state(undone) is None
        await rig.client.forget(root)


async def test_a_holder_that_can_not_live_is_given_up() -> None:
    async with running_pager() as rig:
        killed = 0
        for _ in range(5):
            killed = await _kill_holder(rig, killed)
        assert rig.pager is not None
        assert await asyncio.to_thread(rig.pager.wait, 20) == 1
        await rig.start()  # the next one begins with a mount of its own
