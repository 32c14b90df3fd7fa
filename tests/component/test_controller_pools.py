"""Pools: who gets which machine, what a lease is worth, and that nothing is left of what nobody has."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from forkypig import errors
from forkypig.controller.app import controller
from forkypig.controller.pools import acquiring
from forkypig.controller.pools.filler import Filler
from forkypig.controller.pools.live_pool import LivePool
from forkypig.controller.principal import acting, for_tenant
from forkypig.daemon.settings import Settings
from forkypig.model import Shape
from forkypig.v1 import agent_pb2
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.v1 import pools_pb2 as pools
from tests.component.controller_rig import Client, daemon, eventually, home, serving
from tests.component.fake_host import CREATING, FAILED, PAUSED, RUNNING, FakeHost


@pytest.fixture
def settings(database_url: str) -> Iterator[Settings]:
    with home(database_url) as made:
        yield made


async def create(client: Client, target: int = 2, most: int = 4, source: str = "debian-12", name: str = "py") -> Any:
    request = pools.CreatePoolRequest(name=name, source=source, target=target, max=most)
    return await client.pool("CreatePool", request)


async def filled(client: Client, ready: int, name: str = "py") -> pools.Pool:
    async def is_so() -> Any:
        status = await client.status(name)
        return status if status.ready == ready and not status.filling else None

    return await eventually(is_so)


async def test_a_pool_fills_and_its_machines_are_nobodys(client: Client, host: FakeHost) -> None:
    await create(client)
    status = await filled(client, 2)
    assert [m.state for m in status.machines] == [PAUSED, PAUSED]
    assert all(request.options.paused and request.options.background for request in host.calls["ForkSnapshot"])
    name, id_ = status.machines[0].name, status.machines[0].id
    assert name.startswith("py-")
    assert await client.machines() == {}
    for method in ("GetMachine", "RemoveMachine", "ResumeMachine"):
        for text in (name, id_):
            with pytest.raises(errors.NotFound):
                await client.machine(method, text)
    with pytest.raises(errors.NotFound):
        await client.fork(name)
    with pytest.raises(errors.NotPossibleNow, match="not acquired"):
        await client.run("web", cold_boot=True)
        await client.release("web")


async def test_acquire_use_and_release(client: Client, host: FakeHost) -> None:
    await create(client)
    await filled(client, 2)
    got = await client.acquire(labels={"job": "7"}, ttl_s=60)
    assert got.machine.state == RUNNING
    assert got.lease.labels == {"job": "7"}
    assert got.lease.pool == "py"
    assert list(await client.machines()) == [got.machine.name]
    status = await filled(client, 2)  # refilled behind it
    usage = await client.observation.GetUsage(common.Empty(), timeout=30)
    assert [row.pool for row in usage.machines] == ["py"] * 3
    assert [lease.machine for lease in status.leases] == [got.machine.id]
    renewed = await client.pool("Renew", pools.RenewRequest(machine=got.machine.name, ttl_s=600))
    assert renewed.expires_us > got.lease.expires_us
    await client.release(got.machine.name)
    assert got.machine.id not in host.machines
    assert (await client.status()).acquired == 0
    with pytest.raises(errors.NotFound):
        await client.release(got.machine.name)
    assert {"pool.created", "machine.acquired", "machine.removed"} <= set(await client.events())


@pytest.mark.parametrize("database_url", [""])  # what is tried here is the same with either engine, and costs
async def test_two_hundred_on_a_pool_of_few_are_served_in_their_order(client: Client) -> None:
    await create(client, target=5, most=5)
    await filled(client, 5)
    served: list[pools.AcquireResponse] = []

    async def one() -> None:
        got = await client.acquire(wait_s=25)
        served.append(got)
        await client.release(got.machine.id, recycle=True)

    await asyncio.gather(*(one() for _ in range(200)))
    # Answers travel side by side, and are late by different amounts: it is by the controller's clock that turns are.
    served.sort(key=lambda got: got.arrived_us)
    given = [got.arrived_us + got.waited_ms * 1000 for got in served]
    assert len(given) == 200
    assert given == sorted(given)
    assert given[-1] - given[0] > 1000 * served[5].waited_ms  # they did wait


async def test_waiting_ends_at_the_deadline_and_says_what_to_do(client: Client) -> None:
    await create(client, target=0, most=1)
    got = await client.acquire()
    with pytest.raises(errors.ResourceExhausted, match=r"1 of the 1.*release some.*--max"):
        await client.acquire(wait_s=0.1)
    second = asyncio.create_task(client.acquire())
    await eventually(lambda: _waiting(client, 1))
    third = asyncio.create_task(client.acquire())
    await eventually(lambda: _waiting(client, 2))
    second.cancel()  # leaves the queue
    await eventually(lambda: _waiting(client, 1))
    await client.release(got.machine.id)
    assert (await third).machine.state == RUNNING


async def _waiting(client: Client, count: int) -> bool:
    return (await client.status()).waiting == count


async def test_a_caller_who_leaves_as_they_are_given_a_machine_gives_it_back(client: Client, host: FakeHost) -> None:
    await create(client, target=1, most=1)
    first = (await filled(client, 1)).machines[0].id
    stall = host.stall("AcquireMachine")
    caller = asyncio.create_task(client.acquire())
    await stall.reached.wait()
    caller.cancel()
    await asyncio.wait({caller})
    await client.machines()  # that they left is known by the time a later call is answered
    del host.stalls["AcquireMachine"]
    stall.go.set()
    assert [m.id for m in (await eventually(lambda: _another(client, first))).machines] != [first]
    assert first not in host.machines  # it has run
    assert (await client.status()).acquired == 0


async def _another(client: Client, machine: str) -> Any:
    status = await client.status()
    return status if status.ready == 1 and status.machines[0].id != machine else None


async def test_a_machine_that_runs_and_could_not_be_written_down_is_nobodys_and_goes(
    client: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(client, target=1, most=1)
    first = (await filled(client, 1)).machines[0].id

    async def full(*_: Any, **__: Any) -> None:
        await eventually(lambda: _runs(host, first))
        raise errors.ResourceExhausted("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(acquiring.intents, "add", full)
        with pytest.raises(errors.ResourceExhausted, match="disk is full"):
            await client.acquire()
    assert [m.id for m in (await eventually(lambda: _another(client, first))).machines] != [first]
    assert first not in host.machines
    assert not await client.machines()


async def _runs(host: FakeHost, machine: str) -> bool:
    return host.machines[machine].state == RUNNING


async def test_a_machine_that_was_acquired_a_moment_ago_is_not_taken_for_left_over(
    client: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it was acquired is noted behind the answer; what is compared meanwhile leaves it to whoever has it."""
    monkeypatch.setattr(acquiring, "_BEHIND_S", 2.0)
    await create(client, target=1, most=2)
    await filled(client, 1)
    web = await client.run("web", cold_boot=True)
    got = (await client.acquire()).machine
    await client.machine("PauseMachine", got.name)
    host.change(web.id, state=FAILED)  # has everything compared

    async def is_seen() -> bool:
        return (await client.machines())["web"].state == FAILED

    await eventually(is_seen, 1.5)
    assert (await client.machine("GetMachine", got.name)).state == PAUSED
    assert got.id in host.machines


async def test_a_machine_that_is_no_good_is_replaced_and_its_caller_gets_another(
    client: Client, host: FakeHost
) -> None:
    await create(client)
    status = await filled(client, 2)
    host.fail("AcquireMachine", errors.MachineFailed("QEMU refused"))
    got = await client.acquire()
    assert got.machine.id == status.machines[1].id
    status = await filled(client, 2)
    host.change(status.machines[0].id, state=FAILED)
    await eventually(lambda: _gone(host, status.machines[0].id))
    await filled(client, 2)


async def _gone(host: FakeHost, machine: str) -> bool:
    return machine not in host.machines


@pytest.mark.parametrize("database_url", [""])  # what is tried here is the same with either engine, and costs
async def test_a_lease_ends_when_nobody_uses_the_machine(client: Client, host: FakeHost) -> None:
    await create(client)
    await filled(client, 2)
    used = await client.acquire()
    using = client.agent.Exec()
    start = agent_pb2.ExecStart(machine=used.machine.name, argv=["cat"], stdin=True)
    await using.write(agent_pb2.ExecRequest(start=start))
    await using.read()
    await client.pool("Renew", pools.RenewRequest(machine=used.machine.name, ttl_s=1))
    idle = await client.acquire(ttl_s=1)
    await eventually(lambda: _gone(host, idle.machine.id))
    assert "lease.expired" in await client.events()
    assert used.machine.id in host.machines
    using.cancel()
    await eventually(lambda: _gone(host, used.machine.id))


async def test_run_takes_a_machine_of_a_pool_that_fits(client: Client, host: FakeHost) -> None:
    await create(client)
    status = await filled(client, 2)
    ran = (await client.run_all("web"))[-1].result
    assert (ran.pool, ran.machine.name, ran.machine.state) == ("py", "web", RUNNING)
    assert ran.machine.id == status.machines[0].id
    assert host.machines[ran.machine.id].name == "web"
    with pytest.raises(errors.AlreadyExists):
        await client.run("web")
    assert (await filled(client, 2)).acquired == 0  # it is no lease
    assert ran.machine.expires_us == 0
    leased = (await client.run_all("leased", ttl_s=1))[-1].result
    assert (leased.pool, leased.machine.expires_us > 0) == ("py", True)
    assert (await filled(client, 2)).acquired == 0  # nor is this one of the pool
    await eventually(lambda: _gone(host, leased.machine.id))
    other = (await client.run_all("big", shape=common.Shape(memory_mib=1024)))[-1].result
    assert other.pool == ""
    isolated = common.ConfigChange(mode=common.NETWORK_MODE_ISOLATED)
    apart = (await client.run_all("apart", config=isolated))[-1].result
    assert apart.pool == "py"
    assert host.machines[apart.machine.id].config.mode == common.NETWORK_MODE_ISOLATED


async def test_a_pool_that_is_found_as_it_is_made_is_filled_by_one(
    settings: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a second pools are compared with the database, also right after it has got a new one."""
    filling: list[str] = []
    keep = Filler.keep

    async def counted(self: Filler, live: LivePool) -> None:
        filling.append(live.pool.name)
        await keep(self, live)

    monkeypatch.setattr(Filler, "keep", counted)
    async with controller(settings) as app:
        write = app.desk.store.write

        @contextlib.asynccontextmanager
        async def compared_after(**how: Any) -> AsyncIterator[Any]:
            async with write(**how) as tx:
                yield tx
            await app.pools._compare()

        async def is_full() -> bool:
            return (await app.pools.get("py")).ready == 1

        with acting(for_tenant("default")):
            monkeypatch.setattr(app.desk.store, "write", compared_after)
            await app.pools.create("py", "debian-12", Shape(0, 0, 0), 1, 1)
            monkeypatch.undo()
            await eventually(is_full)
        await app.desk.journal.stop()
    assert filling == ["py"]


async def test_demand_grows_the_pool_and_scale_changes_it(client: Client) -> None:
    await create(client, target=1, most=8)
    await filled(client, 1)
    await asyncio.gather(*(client.acquire() for _ in range(4)))
    await filled(client, 4)  # as many as were asked for at once, within the maximum of eight
    scaled = await client.pool("ScalePool", pools.ScalePoolRequest(pool="py", target=0, max=5))
    assert (scaled.target, scaled.max) == (0, 5)
    await filled(client, 1)


async def test_recycling_gives_the_pool_another_machine_and_the_old_one_ends(client: Client, host: FakeHost) -> None:
    await create(client, target=0, most=1)
    got = await client.acquire()
    await client.release(got.machine.id, recycle=True)
    status = await filled(client, 1)
    assert status.machines[0].id != got.machine.id
    assert status.machines[0].name != got.machine.name
    assert set(host.machines) == {status.machines[0].id}


async def test_removing_a_pool_ends_what_waits_in_it_and_who_waits_for_it(client: Client, host: FakeHost) -> None:
    await create(client, target=1, most=1)
    await filled(client, 1)
    got = await client.acquire()
    caller = asyncio.create_task(client.acquire())
    await eventually(lambda: _waiting(client, 1))
    await create(client, name="two")
    await filled(client, 2, "two")
    await client.pool("RemovePool", pools.PoolRequest(pool="py"))
    with pytest.raises(errors.NotFound, match="removed"):
        await caller
    await client.pool("RemovePool", pools.PoolRequest(pool="two"))
    assert set(host.machines) == {got.machine.id}
    assert not (await client.pool("ListPools", pools.ListPoolsRequest())).pools
    await client.release(got.machine.id, recycle=True)  # the pool is gone, the lease was not
    assert not host.machines


async def test_a_pool_keeps_the_snapshot_that_it_begins_with(client: Client, host: FakeHost) -> None:
    await client.run("web", cold_boot=True)
    kept = await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="clean"))
    await client.machine("RemoveMachine", "web")
    await create(client, source="clean", target=0)
    with pytest.raises(errors.NotPossibleNow, match="pool «py»"):
        await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="clean"))
    got = await client.acquire()
    assert got.machine.snapshot == kept.id
    with pytest.raises(errors.NotPossibleNow, match="forky pool rm py"):  # the pool first, and its machines after that
        await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="clean"))
    await client.release(got.machine.id)
    await client.pool("RemovePool", pools.PoolRequest(pool="py"))
    await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="clean"))


async def test_nothing_is_made_ahead_while_memory_is_short(client: Client, host: FakeHost) -> None:
    """And the pool says so, to who looks and to who asks."""
    there = host.pressure.memory_available_mib
    host.pressure.memory_available_mib = 900  # tight: less than twice what is kept free
    await client.run("web")
    await create(client)

    async def says(what: str) -> bool:
        return what in (await client.status()).failure

    await eventually(lambda: says("short of memory"))
    with pytest.raises(errors.ResourceExhausted, match=r"can't be refilled.*short of memory.*hibernate"):
        await client.acquire(wait_s=0.1)
    assert (await client.status()).ready == 0
    host.pressure.memory_available_mib = there
    assert (await client.acquire(wait_s=30)).machine.state == RUNNING
    assert (await client.status()).failure == ""


async def test_what_can_not_be_is_told_in_a_sentence(client: Client) -> None:
    await create(client, target=0)
    with pytest.raises(errors.AlreadyExists):
        await create(client)
    with pytest.raises(errors.NotPossibleNow, match="forky pool rm py"):
        await client.call("RemoveImage", pb.ImageRequest(image="debian-12"))
    for fields in ({"name": "No/Name"}, {"name": "x", "target": 5, "most": 4}, {"name": "x" * 60}):
        with pytest.raises(errors.InvalidRequest):
            await create(client, **fields)
    with pytest.raises(errors.NotFound):
        await create(client, name="other", source="nothing")
    for wrong in ({"ttl_s": -1}, {"ttl_s": float("nan")}, {"wait_s": 1e9}, {"labels": {"": "x"}}):
        with pytest.raises(errors.InvalidRequest):
            await client.acquire(**wrong)
    with pytest.raises(errors.NotFound):
        await client.acquire(pool="none")


async def test_a_refill_that_fails_is_told_and_tried_again(client: Client, host: FakeHost) -> None:
    for _ in range(2):
        host.fail("ForkSnapshot", errors.ResourceExhausted("no memory is left"))
    await create(client, target=1)

    async def failed() -> bool:
        return "no memory" in (await client.status()).failure

    await eventually(failed)
    with pytest.raises(errors.ResourceExhausted, match="can't be refilled: no memory is left"):
        await client.acquire(wait_s=0.1)
    await filled(client, 1)
    assert (await client.status()).failure == ""


# -- kill -9 of the controller -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", [""])  # what is tried here is the same with either engine, and costs
@pytest.mark.parametrize("host_did", ["all", "half"])
async def test_killed_while_it_fills(settings: Settings, host: FakeHost, host_did: str) -> None:
    async with daemon(settings) as (process, client):
        stall = host.stall("ForkSnapshot")
        await create(client, target=2, most=2)
        await stall.reached.wait()
        await process.kill()
    del host.stalls["ForkSnapshot"]
    request = host.calls["ForkSnapshot"][-1]
    if host_did != "nothing":
        await host._do_ForkSnapshot(request)
    if host_did == "half":
        host.machines[request.children[0].machine].state = FAILED
    asked = {child.machine for child in request.children}
    async with serving(settings) as client:
        status = await filled(client, 2)
        assert set(host.machines) == {m.id for m in status.machines}
        assert (asked == set(host.machines)) is (host_did == "all")


@pytest.mark.parametrize("database_url", [""])  # what is tried here is the same with either engine, and costs
async def test_killed_while_it_hands_a_machine_over(settings: Settings, host: FakeHost) -> None:
    async with daemon(settings) as (process, client):
        await create(client, target=1, most=1)
        await filled(client, 1)
        stall = host.stall("AcquireMachine")
        caller = asyncio.create_task(client.acquire(ttl_s=1))
        await stall.reached.wait()
        await eventually(lambda: _leased(client))
        await process.kill()
        with pytest.raises(errors.ForkyError):
            await caller
    del host.stalls["AcquireMachine"]
    leaked = host.calls["AcquireMachine"][-1].machine
    async with serving(settings) as client:
        await eventually(lambda: _gone(host, leaked))  # nobody was told of it
        status = await filled(client, 1)
        assert set(host.machines) == {m.id for m in status.machines}


@pytest.mark.parametrize("database_url", [""])  # what is tried here is the same with either engine, and costs
async def test_killed_while_it_removes_a_pool(settings: Settings, host: FakeHost) -> None:
    async with daemon(settings) as (process, client):
        await create(client)
        await filled(client, 2)
        stall = host.stall("RemoveMachine")
        removal = asyncio.create_task(client.pool("RemovePool", pools.PoolRequest(pool="py")))
        await stall.reached.wait()
        await process.kill()
        with pytest.raises(errors.ForkyError):
            await removal
    del host.stalls["RemoveMachine"]
    async with serving(settings) as client:
        await eventually(lambda: _none(host))
        assert not (await client.pool("ListPools", pools.ListPoolsRequest())).pools
        await eventually(lambda: _no_machines(client))


async def _leased(client: Client) -> bool:
    return bool((await client.status()).leases)


async def _no_machines(client: Client) -> bool:
    return not await client.machines()


async def _none(host: FakeHost) -> bool:
    return not host.machines


async def test_leases_and_ready_machines_outlive_the_controller(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        await create(client)
        await filled(client, 2)
        got = await client.acquire(ttl_s=300)
        before = await filled(client, 2)
    calls = len(host.calls["ForkSnapshot"])
    async with serving(settings) as client:
        after = await filled(client, 2)
        assert {m.id for m in after.machines} == {m.id for m in before.machines}
        assert [lease.machine for lease in after.leases] == [got.machine.id]
        assert len(host.calls["ForkSnapshot"]) == calls
        assert (await client.acquire()).machine.id in {m.id for m in before.machines}


async def test_hostd_is_gone_for_a_while(client: Client, host: FakeHost) -> None:
    await create(client)
    await filled(client, 2)
    await host.stop()
    with pytest.raises(errors.HostUnreachable):
        await client.acquire(wait_s=0)
    await host.start()
    status = await filled(client, 2)
    # What was being handed over is removed by and by.
    await eventually(lambda: _are(host, {m.id for m in status.machines}))
    assert all(m.state != CREATING for m in host.machines.values())


async def _are(host: FakeHost, machines: set[str]) -> bool:
    return set(host.machines) == machines
