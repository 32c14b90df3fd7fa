"""Packing and serving from the store: disks, device state, and deaths of the processes that do it."""

import asyncio
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from forkypig.chunks.collect import Moved, collect
from forkypig.chunks.store import Store
from forkypig.errors import NotFound, NotPossibleNow
from forkypig.model.ids import SnapshotId
from forkypig.pager.order import BaseImage, Disk, DiskLayer, Extent
from forkypig.v1 import pager_pb2
from tests.component.pager_rig import PAGE, Model, Rig, child_of, drop_cache, order, running_pager

pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="FUSE with allow_other needs root")
MIB = 2**20
SIZE = 4 * MIB
PACKER = "forkypig.pager.packer"
FROZEN, PACKED = pager_pb2.PagerSnapshot.STATE_FROZEN, pager_pb2.PagerSnapshot.STATE_PACKED


async def _frozen(rig: Rig, size: int = SIZE, parent: SnapshotId | None = None) -> tuple[SnapshotId, bytes]:
    model = Model(size, seed=3)
    guest = await asyncio.to_thread(rig.guest, parent, size)
    await asyncio.to_thread(model.scribble, guest, 30)
    return await rig.split(guest, parent, size), bytes(model.data)


def _base(home: Path) -> BaseImage:
    """An image whose last page is not whole."""
    path = home / "images" / "i-test" / "disk.raw"
    path.parent.mkdir(parents=True)
    path.write_bytes(random.Random(1).randbytes(MIB) + bytes(MIB) + random.Random(2).randbytes(MIB + 100))
    return BaseImage("i-test", path, "0" * 64)


def _layer(path: Path, disk: bytearray, writes: list[tuple[int, bytes | int]]) -> DiskLayer:
    """A layer's file with `writes` (bytes, or so many zeros), which are also made on `disk`."""
    extents, content = [], bytearray(b"header")
    for offset, data in sorted(writes, key=lambda write: write[0]):
        length = data if isinstance(data, int) else len(data)
        extents.append(Extent(offset, length, None if isinstance(data, int) else len(content)))
        disk[offset : offset + length] = bytes(length) if isinstance(data, int) else data
        content += b"" if isinstance(data, int) else data
    path.write_bytes(content)
    return DiskLayer(path, extents)


async def test_a_disk_is_its_layers_over_the_image_or_over_a_packed_one() -> None:
    async with running_pager() as rig:
        base = await asyncio.to_thread(_base, rig.home)
        content = base.path.read_bytes()
        expected = bytearray(content.ljust(4 * MIB, b"\0"))
        made = random.Random(5)
        lower = _layer(
            rig.home / "lower",
            expected,
            [
                (65536, made.randbytes(65536)),
                (300000, b"unaligned"),
                (MIB - 100, 300),
                (3 * MIB + 200, made.randbytes(9000)),
            ],
        )
        upper = _layer(
            rig.home / "upper", expected, [(65536 + 4096, 8192), (131072, content[131072:196608]), (300004, b"ALI")]
        )
        devices = rig.home / "devices"
        devices.write_bytes(made.randbytes(70000))
        first, memory = await _frozen(rig)
        disk = Disk(size_bytes=4 * MIB, layers=[upper, lower], below=None, base=base)
        await rig.pack(first, disk, devices)
        assert await rig.content(first, name="disk") == expected
        assert await rig.content(first, name="devices") == devices.read_bytes()
        assert await rig.content(first) == memory
        again = _layer(rig.home / "again", expected, [(0, made.randbytes(4096)), (2 * MIB, 65536), (300001, b"!")])
        second, _ = await _frozen(rig, parent=first)
        stored = (await rig.client.status()).stored_bytes
        await rig.pack(second, Disk(size_bytes=4 * MIB, layers=[again], below=first, base=base), devices)
        assert (await rig.client.status()).stored_bytes - stored < 400_000
        for layer in ("upper", "lower", "again", "devices"):
            (rig.home / layer).unlink()
        await rig.client.forget(first)
        await rig.stop()
        await rig.start()
        assert await rig.content(second, name="disk") == expected
        assert await rig.content(second, 300_000, 9, name="disk") == expected[300_000:300_009]
        assert len(await rig.content(second, name="devices")) == 70000
        assert sorted(path.name for path in rig.file(second).parent.iterdir()) == ["devices", "disk", "memory"]
        status = next(s for s in (await rig.client.status()).snapshots if s.snapshot == second)
        assert (status.disk_bytes, status.devices_bytes, status.state) == (4 * MIB, 70000, PACKED)


async def test_readers_that_die_under_load_cost_a_delay_and_nothing_else() -> None:
    async with running_pager() as rig:
        snapshot, expected = await _frozen(rig)
        await rig.pack(snapshot)
        drop_cache(rig.file(snapshot))
        guests = [await asyncio.to_thread(rig.guest, snapshot, SIZE) for _ in range(2)]
        ended = asyncio.Event()

        async def machine(number: int) -> int:
            """Faults all over its memory, dropping what is cached, and compares."""
            places, rounds = random.Random(number), 0
            while not ended.is_set():
                offset = places.randrange(SIZE // PAGE) * PAGE
                assert await asyncio.to_thread(guests[number].read, offset, PAGE) == expected[offset : offset + PAGE]
                await asyncio.to_thread(drop_cache, rig.file(snapshot))
                assert await rig.content(snapshot, offset, 8 * PAGE) == expected[offset : offset + 8 * PAGE]
                rounds += 1
            return rounds

        machines = [asyncio.create_task(machine(number)) for number in range(2)]
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < 5:
            assert time.monotonic() < deadline
            reader = await rig.reader_pid()
            if reader and reader not in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(reader, signal.SIGKILL)
                killed.add(reader)
            await asyncio.sleep(0.2)
        while rig.log().count("event='reader died'") + rig.log().count('event="reader died"') < 5:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        ended.set()
        assert min(await asyncio.gather(*machines)) > 0


async def test_a_packer_that_is_killed_leaves_everything_as_it_was() -> None:
    async with running_pager() as rig:
        size = 64 * MIB
        guest = await asyncio.to_thread(rig.guest, None, size)
        await asyncio.to_thread(guest.dirty, 0, size)
        root = await rig.split(guest, None, size)
        for _ in range(2):
            with pytest.raises(NotPossibleNow, match="try again"):
                async for progress in rig.client.pack(root, order()):
                    if 0 < progress.done < size and (packer := child_of(rig.holder_pid, PACKER)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(packer, signal.SIGKILL)
            assert await rig.state(root) == FROZEN
        content = await rig.content(root)
        assert await rig.pack(root) == size
        packs = rig.home / "store" / "packs"
        assert [path.suffix for path in packs.iterdir()] == [".pack"]
        guest.end()
        drop_cache(rig.file(root))
        assert await rig.content(root) == content


async def _closed(pid: int, *names: str) -> None:
    """Waits until the process has no such file open."""
    deadline = time.monotonic() + 60
    while opened := [
        name
        for name in (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
        if any(each in name for each in names)
    ]:
        assert time.monotonic() < deadline, f"a job leaves open: {opened}"
        await asyncio.sleep(0.1)


async def test_a_packer_stays_for_the_next_job_and_is_replaced_when_it_was_killed() -> None:
    async with running_pager() as rig:
        snapshots = [(await _frozen(rig))[0] for _ in range(4)]
        await rig.pack(snapshots[0])
        first = child_of(rig.holder_pid, PACKER)
        assert os.sched_getscheduler(first) == os.SCHED_IDLE
        await rig.pack(snapshots[1])
        assert child_of(rig.holder_pid, PACKER) == first
        await _closed(first, "memfd:", "/mem")
        os.kill(first, signal.SIGKILL)
        await rig.pack(snapshots[2])
        second = child_of(rig.holder_pid, PACKER)
        os.kill(second, signal.SIGSTOP)
        packing = asyncio.create_task(rig.pack(snapshots[3]))
        await asyncio.sleep(0.2)
        os.kill(second, signal.SIGKILL)  # it had the job, and had not begun
        await packing
        assert second not in (first, child_of(rig.holder_pid, PACKER))
        assert await rig.state(snapshots[3]) == PACKED


async def test_a_packer_keeps_the_store_open_but_no_pack_that_was_collected() -> None:
    async with running_pager() as rig:
        snapshot: SnapshotId | None = None
        for _ in range(3):  # each time pages are looked for in the packs before
            guest = await asyncio.to_thread(rig.guest, snapshot, SIZE)
            await asyncio.to_thread(guest.dirty, 0, 10 * PAGE)
            snapshot = await rig.split(guest, snapshot, SIZE)
            await rig.pack(snapshot)
        process = Path("/proc") / str(child_of(rig.holder_pid, PACKER))

        def held() -> str:
            """Packs that it has open or mapped; removed ones are called deleted."""
            return (
                " ".join(str(entry.readlink()) for entry in (process / "fd").iterdir()) + (process / "maps").read_text()
            )

        first, second, _ = sorted((rig.home / "store" / "packs").glob("*.pack"))
        assert first.name in held()
        assert second.name in held()
        first.unlink()
        deadline = time.monotonic() + 60
        while first.name in held():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert second.name in held()


async def test_a_snapshot_that_is_forgotten_while_it_is_packed_leaves_no_manifest() -> None:
    async with running_pager() as rig:
        snapshot, _ = await _frozen(rig, 64 * MIB)
        packing = asyncio.create_task(rig.pack(snapshot))
        await asyncio.sleep(0.2)
        await rig.client.forget(snapshot)
        with contextlib.suppress(NotPossibleNow, NotFound):
            await packing
        assert list((rig.home / "store" / "manifests").iterdir()) == []


async def test_a_damaged_pack_is_an_error_and_no_wrong_page() -> None:
    async with running_pager() as rig:
        snapshot, _ = await _frozen(rig)
        await rig.pack(snapshot)
        await rig.stop()
        (pack,) = (rig.home / "store" / "packs").glob("*.pack")
        content = bytearray(pack.read_bytes())
        for at in range(64, len(content) // 2, 97):
            content[at] ^= 0x55
        pack.write_bytes(content)
        await rig.start()
        with pytest.raises(OSError, match="Input/output"):
            await rig.content(snapshot)
        assert "read failed" in rig.log()
        assert await rig.reader_pid()


async def test_the_working_set_of_a_start_is_pushed_at_the_next() -> None:
    async with running_pager() as rig:
        size = 16 * MIB
        guest = await asyncio.to_thread(rig.guest, None, size)
        await asyncio.to_thread(guest.dirty, 0, size)
        root = await rig.split(guest, None, size)
        successor = await asyncio.to_thread(rig.guest, root, size)
        offsets = [(number * 7919) % (size // PAGE) * PAGE for number in range(20)]
        expected = [await asyncio.to_thread(successor.read, offset, 12) for offset in offsets]
        await rig.client.end_of_load(root)
        await asyncio.to_thread(rig.told, "event=started")  # what it touched is known
        await rig.pack(root)
        for one in rig.guests:
            one.end()
        await rig.stop()
        await rig.start()
        child = await asyncio.to_thread(rig.guest, root, size)  # maps it and reads nothing
        await asyncio.to_thread(rig.told, "event=pushed")
        assert [await asyncio.to_thread(child.read, offset, 12) for offset in offsets] == expected
        status = await rig.client.status()
        assert {s.snapshot: s.reads for s in status.snapshots}[root] == 0, "pages that were pushed were read again"
        assert 20 * PAGE <= status.cached_bytes <= size
        assert (rig.home / "store" / "touched" / root).exists()
        # One that runs on what it has written itself keeps nothing of that in the page cache for the next.
        for offset in offsets:
            await asyncio.to_thread(child.dirty, offset, min(offset + 4 * PAGE, size))
        drop_cache(rig.file(root))
        reads = {s.snapshot: s.reads for s in (await rig.client.status()).snapshots}[root]
        pushes = rig.log().count("event=pushed")
        second = await asyncio.to_thread(rig.guest, root, size)
        await asyncio.to_thread(rig.told, "event=pushed", pushes + 1)
        assert [await asyncio.to_thread(second.read, offset, 12) for offset in offsets] == expected
        status = await rig.client.status()
        assert {s.snapshot: s.reads for s in status.snapshots}[root] == reads, "a machine that runs kept the push away"


async def test_chunks_that_a_collection_moves_are_found_at_their_new_places() -> None:
    async with running_pager() as rig:
        first = await asyncio.to_thread(rig.guest, None, SIZE)
        await asyncio.to_thread(first.dirty, 0, SIZE)
        gone = await rig.split(first, None, SIZE)
        second = await asyncio.to_thread(rig.guest, gone, SIZE)
        await asyncio.to_thread(second.dirty, 0, SIZE // 2)
        kept = await rig.split(second, gone, SIZE)
        await rig.pack(gone)
        await rig.pack(kept)
        expected = await rig.content(kept)
        guest = await asyncio.to_thread(rig.guest, kept, SIZE)
        assert await asyncio.to_thread(guest.read, 0, PAGE) == expected[:PAGE]
        frozen = await rig.split(guest, kept, SIZE)
        await rig.client.forget(gone)
        loop, tables = asyncio.get_running_loop(), rig.home / "store" / "moved.npz"

        def tell(moved: Moved) -> None:
            np.savez(tables, **{f"{number:016x}": table for number, table in moved.tables.items()})  # type: ignore[arg-type]
            asyncio.run_coroutine_threadsafe(rig.client.move(tables), loop).result(20)

        store = Store.open(rig.home / "store")
        collected = await asyncio.to_thread(lambda: collect(store, before_removal=tell))
        assert collected.packs_rewritten
        for snapshot in (kept, frozen):
            drop_cache(rig.file(snapshot))
            assert await rig.content(snapshot) == expected
        assert "failed" not in rig.log()
