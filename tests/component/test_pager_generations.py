"""Snapshots of processes that stand on snapshots: contents, byte for byte, before and after packing."""

import asyncio

import pytest

from forkypig.model import SnapshotId
from forkypig.v1 import pager_pb2
from tests.component.pager_rig import PAGE, Model, Rig, running_pager

pytestmark = pytest.mark.skipif("os.geteuid() != 0", reason="FUSE with allow_other needs root")
FROZEN, PACKED = pager_pb2.PagerSnapshot.STATE_FROZEN, pager_pb2.PagerSnapshot.STATE_PACKED
SIZE = 5 * 2**20 + 3 * PAGE  # not whole regions


async def _generations(rig: Rig, count: int) -> list[tuple[SnapshotId, bytes]]:
    """Snapshots, each standing on the one before, with what they should hold."""
    model = Model(SIZE, seed=count)
    made: list[tuple[SnapshotId, bytes]] = []
    parent: SnapshotId | None = None
    for _ in range(count):
        guest = await asyncio.to_thread(rig.guest, parent, SIZE)
        await asyncio.to_thread(model.scribble, guest, 20)
        parent = await rig.split(guest, parent, SIZE)
        await rig.client.end_of_load(parent)
        made.append((parent, bytes(model.data)))
    return made


async def test_three_generations_all_frozen() -> None:
    async with running_pager() as rig:
        for snapshot, expected in reversed(await _generations(rig, 3)):  # the deepest first: nothing is cached yet
            assert await rig.content(snapshot) == expected


async def test_three_generations_packed_in_any_order() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 3)
        assert await rig.content(made[2][0], 0, PAGE) == made[2][1][:PAGE]
        for position in (2, 0, 1):
            await rig.pack(made[position][0])
            rig.guests[position].end()
        for snapshot, expected in made:
            assert await rig.content(snapshot) == expected


async def test_a_packed_snapshot_needs_no_process_and_survives_the_pager() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 3)
        await rig.pack(made[2][0])  # with what it needs of its ancestors, which stay as they are
        assert [await rig.state(snapshot) for snapshot, _ in made] == [FROZEN, FROZEN, PACKED]
        for guest in rig.guests:
            guest.end()
        await rig.stop()
        await rig.start()
        await rig.client.open(made[2][0], SIZE, made[1][0])
        assert await rig.content(made[2][0]) == made[2][1]
        assert await rig.state(made[1][0]) is None


async def test_a_pager_that_was_killed_leaves_a_mount_that_the_next_one_takes_away() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 2)
        await rig.pack(made[0][0])
        await rig.kill()
        await rig.start()
        assert await rig.content(made[0][0]) == made[0][1]
        # The second one is frozen still, and is told to the new pager again. Its own pages are there; so is the rest.
        guest = rig.guests[1]
        await rig.client.reserve(made[1][0], SIZE, made[0][0], guest.pid, guest.address)
        await rig.client.bind(made[1][0])
        assert await rig.content(made[1][0]) == made[1][1]


async def test_a_machine_runs_on_a_chain_where_everything_is_frozen() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 3)
        guest = await asyncio.to_thread(rig.guest, made[2][0], SIZE)
        assert await asyncio.to_thread(guest.read, 0, SIZE) == made[2][1]
        await asyncio.to_thread(guest.write, PAGE, b"mine")
        assert (await rig.content(made[2][0], PAGE, 4)) == made[2][1][PAGE : PAGE + 4]


async def test_forgetting_a_packed_snapshot_leaves_those_who_stand_on_it() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 3)
        await rig.pack(made[1][0])
        await rig.pack(made[2][0])
        await rig.client.forget(made[1][0])
        assert not rig.file(made[1][0]).exists()
        assert [path.stem for path in (rig.home / "store" / "manifests").iterdir()] == [made[2][0]]
        await rig.stop()
        await rig.start()
        assert await rig.content(made[2][0]) == made[2][1]


async def test_what_stands_on_a_packed_snapshot_is_made_of_both() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 2)
        await rig.pack(made[1][0])
        await rig.stop()
        await rig.start()
        model = Model(SIZE, seed=9)
        model.data[:] = made[1][1]
        guest = await asyncio.to_thread(rig.guest, made[1][0], SIZE)
        await asyncio.to_thread(model.scribble, guest, 20)
        child = await rig.split(guest, made[1][0], SIZE)
        assert await rig.content(child) == model.data
        stored = (await rig.client.status()).stored_bytes
        await rig.pack(child)
        assert await rig.content(child) == model.data
        status = await rig.client.status()
        own_bytes = next(s.own_bytes for s in status.snapshots if s.snapshot == child)
        assert status.stored_bytes - stored < own_bytes, "what the parent has is stored twice"


async def test_reading_while_the_chain_is_packed() -> None:
    async with running_pager() as rig:
        made = await _generations(rig, 4)
        readers = [asyncio.create_task(rig.content(s)) for s, _ in made for _ in range(2)]
        packing = [asyncio.create_task(rig.pack(s)) for s, _ in made]
        contents = await asyncio.wait_for(asyncio.gather(*readers), 60)
        await asyncio.wait_for(asyncio.gather(*packing), 60)
        assert contents == [expected for _, expected in made for _ in range(2)]
