"""Acquire, by many and again: each caller gets one machine and each machine one caller, whatever is lost on the way."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from forkypig import errors
from forkypig.controller import peers
from forkypig.daemon.settings import Settings
from forkypig.v1 import pools_pb2 as pb
from forkypig.wire.keys import KEY, NEW
from tests.component.controller_rig import Client, eventually, home, rpc_errors, running_host, serving
from tests.component.fake_host import FakeHost


@pytest.fixture
def settings(database_url: str) -> Iterator[Settings]:
    with home(database_url) as made:
        yield made


async def create(client: Client, target: int, most: int) -> None:
    await client.pool("CreatePool", pb.CreatePoolRequest(name="py", source="debian-12", target=target, max=most))

    async def full() -> bool:
        return (await client.status()).ready == target

    await eventually(full)


async def acquire(client: Client, key: str, *more: tuple[str, str], **fields: Any) -> pb.AcquireResponse:
    """With an idempotency key, and more metadata."""
    request = pb.AcquireRequest(**{"pool": "py", "wait_s": 10, **fields})
    with rpc_errors():
        answer: pb.AcquireResponse = await client.pools.Acquire(request, timeout=30, metadata=[(KEY, key), *more])
    return answer


async def leased(client: Client) -> set[str]:
    return {lease.machine for lease in (await client.status()).leases}


async def test_a_request_that_comes_again_gets_the_same_machine(client: Client, host: FakeHost) -> None:
    await create(client, 2, 4)
    first = await acquire(client, "one")
    assert await acquire(client, "one") == first
    assert len(host.calls["AcquireMachine"]) == 1
    other = await acquire(client, "two")
    assert other.machine.id != first.machine.id
    with pytest.raises(errors.InvalidRequest, match="new key"):
        await acquire(client, "one", ttl_s=5)
    # What came to nothing is asked for anew, and what was of no use to the first is not what the second is told of.
    host.fail("AcquireMachine", errors.MachineFailed("QEMU refused"))
    third = await acquire(client, "three")
    assert await acquire(client, "three") == third
    assert await eventually(lambda: _same(client, {first.machine.id, other.machine.id, third.machine.id}))


async def test_who_says_of_a_key_that_it_is_new_when_it_is_not_gets_no_other_machine(client: Client) -> None:
    await create(client, 2, 4)
    first = await acquire(client, "one", (NEW, "one"))
    with pytest.raises(errors.Busy, match="this request"):
        await acquire(client, "one", (NEW, "one"))
    assert await acquire(client, "one") == first
    assert await acquire(client, "one", (NEW, "another's")) == first  # somebody on the way has put in their key
    await eventually(lambda: _same(client, {first.machine.id}))

    async def nobody_has_another() -> bool:
        return list(await client.machines()) == [first.machine.name]

    await eventually(nobody_has_another)


async def _same(client: Client, machines: set[str]) -> bool:
    return await leased(client) == machines


async def test_one_who_left_as_they_were_given_a_machine_asks_again(client: Client, host: FakeHost) -> None:
    await create(client, 2, 2)
    stall = host.stall("AcquireMachine")
    caller = asyncio.create_task(acquire(client, "one"))
    await stall.reached.wait()
    caller.cancel()
    await asyncio.wait({caller})
    del host.stalls["AcquireMachine"]
    again = asyncio.create_task(acquire(client, "one"))
    stall.go.set()
    got = (await again).machine.id
    await eventually(lambda: _same(client, {got}))
    assert got in host.machines


@pytest.mark.parametrize("host_did", [True, False], ids=["it-ran", "it-did-not"])
async def test_the_controller_ends_before_it_has_answered(settings: Settings, host_did: bool) -> None:
    """The next one gives the same machine where it runs; where it does not, that goes, and another is given."""
    async with running_host(settings) as host:
        async with serving(settings) as client:
            await create(client, 2, 2)
            stall = host.stall("AcquireMachine")
            caller = asyncio.create_task(acquire(client, "one"))
            await stall.reached.wait()
            [begun] = await eventually(lambda: leased(client))
            if host_did:
                await host._do_AcquireMachine(host.calls["AcquireMachine"][-1])
        await asyncio.wait({caller})
        assert caller.cancelled() or isinstance(caller.exception(), errors.ForkyError)
        del host.stalls["AcquireMachine"]
        async with serving(settings) as client:
            got = (await acquire(client, "one")).machine.id
            assert (got == begun) is host_did
            assert (await acquire(client, "one")).machine.id == got
            await eventually(lambda: _same(client, {got}))
            await client.release(got)
            with pytest.raises(errors.NotFound):
                await client.release(begun if host_did else got)


async def test_a_run_from_a_pool_that_the_controller_did_not_end_is_undone(settings: Settings) -> None:
    """Half of it could be done: the machine has neither name nor config for sure."""
    async with running_host(settings) as host:
        async with serving(settings) as client:
            await create(client, 1, 1)
            stall = host.stall("AcquireMachine")
            caller = asyncio.create_task(client.run("web"))
            await stall.reached.wait()
        await asyncio.wait({caller})
        assert caller.cancelled() or isinstance(caller.exception(), errors.ForkyError)
        taken = host.calls["AcquireMachine"][-1].machine
        del host.stalls["AcquireMachine"]
        async with serving(settings) as client:
            await eventually(lambda: _gone(client, host, taken))


async def _gone(client: Client, host: FakeHost, machine: str) -> bool:
    return machine not in host.machines and await client.machines() == {}


# -- two controllers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def second(settings: Settings) -> Iterator[Settings]:
    with home(settings.database_url, str(settings.socket("hostd"))) as made:
        yield made


@pytest.fixture
async def other(second: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """The client of another controller on the same database and host."""
    monkeypatch.setattr(peers, "_LIVES_S", 60.0)  # both are in this process, which may stand still for a while
    async with serving(second) as made:
        yield made


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_two_controllers_give_no_machine_to_two(other: Client, client: Client, host: FakeHost) -> None:
    await create(client, 3, 3)
    out: set[str] = set()

    async def one(mine: Client) -> None:
        got = await mine.acquire(wait_s=25)
        assert got.machine.id not in out
        out.add(got.machine.id)
        assert len(out) <= 3
        await asyncio.sleep(0.01)
        out.remove(got.machine.id)
        await mine.release(got.machine.id, recycle=True)

    await asyncio.gather(*(one(mine) for _ in range(10) for mine in (client, other)))
    await eventually(lambda: _same(other, set()))
