"""What goes wrong around the pager: processes that die, disks that are full, forks that are undone."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forkypig.chunks.crypt import Key
from forkypig.chunks.store import Store
from forkypig.errors import AlreadyExists, InvalidRequest, NotFound, NotPossibleNow, ResourceExhausted
from forkypig.model.ids import SnapshotId, new_snapshot_id
from forkypig.pager import mount, succession
from forkypig.v1 import pager_pb2
from tests.component.pager_rig import PAGE, Rig, running_pager

pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="FUSE with allow_other needs root")
SIZE = 4 * 2**20
FROZEN, PACKED = pager_pb2.PagerSnapshot.STATE_FROZEN, pager_pb2.PagerSnapshot.STATE_PACKED


async def _reserved(rig: Rig) -> SnapshotId:
    guest = await asyncio.to_thread(rig.guest, None, SIZE)
    snapshot = new_snapshot_id()
    await rig.client.reserve(snapshot, SIZE, None, guest.pid, guest.address)
    return snapshot


async def test_reading_waits_for_bind() -> None:
    async with running_pager() as rig:
        snapshot = await _reserved(rig)
        await asyncio.to_thread(rig.guests[0].write, 0, b"before the freeze")
        reader = asyncio.create_task(rig.content(snapshot, 0, 17))
        await asyncio.to_thread(rig.waits_for, snapshot)
        assert not reader.done()
        rig.guests[0].freeze()
        await rig.client.bind(snapshot)
        assert await reader == b"before the freeze"


async def test_many_waiting_readers_do_not_hold_up_other_snapshots() -> None:
    # More than pyfuse3's 99 workers and than the kernel's 12 background requests.
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        served = await rig.split(guest, None, SIZE)
        snapshot = await _reserved(rig)
        code = (
            "import os,sys\nfd=os.open(sys.argv[1],0)\n"
            "for i in range(120):\n  os.fork() or (os.pread(fd,1,i*32768), os._exit(0))"
        )
        forker = subprocess.Popen(["python3", "-S", "-c", code, str(rig.file(snapshot))], start_new_session=True)
        try:
            await asyncio.to_thread(forker.wait, 20)
            await asyncio.sleep(0.3)
            assert await rig.content(served) == bytes(SIZE)
            await rig.client.forget(snapshot)
        finally:
            with contextlib.suppress(ProcessLookupError):  # they have read the error, and ended
                os.killpg(forker.pid, 9)


async def test_a_fork_that_is_undone_gives_its_readers_an_error() -> None:
    async with running_pager() as rig:
        snapshot = await _reserved(rig)
        reader = asyncio.create_task(rig.content(snapshot, 0, 10))
        await asyncio.to_thread(rig.waits_for, snapshot)
        await rig.client.forget(snapshot)
        with pytest.raises(OSError, match="Input/output"):
            await reader
        assert not rig.file(snapshot).exists()
        await rig.client.forget(snapshot)  # unknown ones are fine


async def test_a_frozen_process_that_dies_costs_its_snapshot_only() -> None:
    async with running_pager() as rig:
        first = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(first.write, 0, b"root")
        root = await rig.split(first, None, SIZE)
        second = await asyncio.to_thread(rig.guest, root, SIZE)
        await asyncio.to_thread(second.write, 2 * PAGE, b"own")
        child = await rig.split(second, root, SIZE)
        second.end()
        await asyncio.to_thread(rig.told, "snapshot lost")
        with pytest.raises(OSError, match="Input/output"):
            await rig.content(child)
        with pytest.raises(NotPossibleNow, match="has ended"):
            await rig.pack(child)
        assert (await rig.content(root, 0, 4)) == b"root"
        await rig.client.forget(child)


async def test_a_memfd_outlives_its_process() -> None:
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, SIZE - 5, b"still")
        root = await rig.split(guest, None, SIZE)
        guest.end()
        assert await rig.content(root, SIZE - 5, 5) == b"still"
        assert await rig.pack(root) == PAGE
        assert await rig.content(root, SIZE - 5, 5) == b"still"


async def test_a_full_disk_leaves_the_snapshot_in_its_process() -> None:
    async with running_pager() as rig:
        layers = rig.home / "store" / "packs"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(layers)], check=True)
        try:
            guest = await asyncio.to_thread(rig.guest, None, SIZE)
            await asyncio.to_thread(guest.dirty, 0, 3 * 2**20)
            root = await rig.split(guest, None, SIZE)
            with pytest.raises(ResourceExhausted, match="free some"):
                await rig.pack(root)
            assert list(layers.iterdir()) == []
            assert await rig.state(root) == FROZEN
            assert len(set(await rig.content(root))) == 256
            subprocess.run(["mount", "-o", "remount,size=8m", str(layers)], check=True)
            assert await rig.pack(root) == 3 * 2**20
            assert await rig.state(root) == PACKED
        finally:
            subprocess.run(["umount", "-l", str(layers)], check=True)


async def test_a_frozen_process_that_others_need_is_not_forgotten() -> None:
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(guest.write, 0, b"root")
        root = await rig.split(guest, None, SIZE)
        other = await asyncio.to_thread(rig.guest, root, SIZE)
        child = await rig.split(other, root, SIZE)
        with pytest.raises(NotPossibleNow, match="pack it first"):
            await rig.client.forget(root)
        await rig.pack(child)
        await rig.client.forget(root)
        assert (await rig.content(child, 0, 4)) == b"root"


async def test_what_is_asked_wrongly_is_told() -> None:
    async with running_pager() as rig:
        snapshot = await _reserved(rig)
        guest = rig.guests[0]
        await rig.client.reserve(snapshot, SIZE, None, guest.pid, guest.address)  # the same again
        with pytest.raises(AlreadyExists):
            await rig.client.reserve(snapshot, SIZE, None, guest.pid, guest.address + PAGE)
        with pytest.raises(NotFound):
            await rig.client.reserve(new_snapshot_id(), SIZE, new_snapshot_id(), guest.pid, guest.address)
        with pytest.raises(InvalidRequest):
            await rig.client.reserve(SnapshotId("../etc"), SIZE, None, guest.pid, guest.address)
        with pytest.raises(InvalidRequest):
            await rig.client.reserve(new_snapshot_id(), 5000, None, guest.pid, guest.address)
        with pytest.raises(NotPossibleNow, match="maps no"):
            await rig.client.reserve(new_snapshot_id(), SIZE, None, guest.pid, 4096)
        with pytest.raises(NotPossibleNow, match="not frozen yet"):
            await rig.pack(snapshot)
        with pytest.raises(NotFound):
            await rig.client.bind(new_snapshot_id())
        guest.end()
        with pytest.raises(NotPossibleNow, match="ended"):
            await rig.client.bind(snapshot)


async def test_writing_and_resizing_are_refused() -> None:
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, SIZE)
        root = await rig.split(guest, None, SIZE)
        code = (
            "import os,sys\nfd=os.open(sys.argv[1],os.O_RDWR)\nos.ftruncate(fd,int(sys.argv[2]))\n"
            "for act in (lambda: os.pwrite(fd,b'x',0), lambda: os.ftruncate(fd,4096)):\n"
            "  try: act()\n  except OSError as error: print(error.errno)\n"
        )
        done = await asyncio.to_thread(
            subprocess.run,
            ["python3", "-S", "-c", code, str(rig.file(root)), str(SIZE)],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.stdout.split() == ["30", "30"], done.stderr  # EROFS


async def test_a_load_is_pushed_to_the_next_generation() -> None:
    """What the load of a snapshot touched is in the page cache when the next one is bound, and is right."""
    async with running_pager() as rig:
        size = 32 * 2**20
        guest = await asyncio.to_thread(rig.guest, None, size)
        offsets = [n * 1_310_720 for n in range(20)]
        await asyncio.to_thread(guest.dirty, 0, size)
        root = await rig.split(guest, None, size)
        successor = await asyncio.to_thread(rig.guest, root, size)
        expected = [await asyncio.to_thread(successor.read, offset, 12) for offset in offsets]
        await rig.client.end_of_load(root)
        await asyncio.to_thread(successor.write, offsets[3], b"changed here")
        expected[3] = b"changed here"
        child = new_snapshot_id()
        await rig.client.reserve(child, size, root, successor.pid, successor.address)
        shell = await asyncio.to_thread(rig.guest, child, size)  # maps it and reads nothing
        successor.freeze()
        await rig.client.bind(child)
        await asyncio.to_thread(rig.told, "event=pushed")
        assert [await asyncio.to_thread(shell.read, offset, 12) for offset in offsets] == expected
        served = {s.snapshot: s.reads for s in (await rig.client.status()).snapshots}
        assert served[child] == 0, "pages that were pushed were read again"


async def test_a_store_of_another_key_is_told_once(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", Key(b"k" * 32))
    pager = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forkypig.pager"),
        env={**os.environ, "FORKY_HOME": str(tmp_path)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(pager.communicate(), 20)
    assert pager.returncode == succession.CAN_NOT_BE
    assert b"takes a home with that key (FORKY_STORE_KEY)" in said
    assert b"Traceback" not in said
    assert said.count(b"can't serve") == 1
    assert mount.device_of(tmp_path / "memory") is None
