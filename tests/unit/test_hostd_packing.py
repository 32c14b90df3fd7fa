"""Who waits for a packing that another one has begun is told how far that is, and has its turn when it ends."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from forkypig.hostd import packing
from forkypig.model import Progress, SnapshotId

ONE, OTHER = SnapshotId("s-000000000001"), SnapshotId("s-000000000002")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set by the test, it ends the packing that has the turn; what follows has nothing to do."""
    end = asyncio.Event()

    async def pack(_: Any, snapshot: SnapshotId) -> AsyncGenerator[Progress, None]:
        if not end.is_set():
            yield Progress("packing", 1, 2)
            await end.wait()

    monkeypatch.setattr(packing, "_pack", pack)
    monkeypatch.setattr(packing, "_TELL_EVERY_S", 0.001)
    return end


def _host() -> Any:
    return SimpleNamespace(packing_turn=asyncio.Lock(), packed_so_far=(SnapshotId(""), Progress("")))


async def test_who_waits_is_told(begun: asyncio.Event) -> None:
    host = _host()
    async with aclosing(packing.pack(host, ONE)) as first, aclosing(packing.pack(host, ONE)) as same:
        assert await anext(first) == Progress("packing", 1, 2)
        assert await anext(same) == Progress("packing", 1, 2)
        async with aclosing(packing.pack(host, OTHER)) as other:
            assert await anext(other) == Progress("waiting for another packing")
        begun.set()
        assert [each async for each in first] == []
        assert {each.step for each in [each async for each in same]} <= {"packing"}
    assert not host.packing_turn.locked()


async def test_who_goes_away_leaves_the_turn_to_the_next(begun: asyncio.Event) -> None:
    host = _host()
    async with aclosing(packing.pack(host, ONE)) as first:
        await anext(first)
        waiting = asyncio.create_task(anext(packing.pack(host, OTHER), None))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    begun.set()
    assert [each async for each in packing.pack(host, OTHER)] == []
    assert not host.packing_turn.locked()
