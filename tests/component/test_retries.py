"""Requests that come again are carried out once: at the same time, afterwards, after their caller or the controller has
gone in the middle."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from forkypig import errors
from forkypig.controller.store import answers
from forkypig.daemon.settings import Settings
from forkypig.sdk.client import Forky
from forkypig.v1 import common_pb2
from forkypig.v1 import controller_pb2 as pb
from tests.component.access_rig import Caller, Served, serving
from tests.component.controller_rig import Daemon, eventually, home, running_host
from tests.component.fake_host import FakeHost


@pytest.fixture
def of_either_engine(database_url: str) -> Iterator[Settings]:
    with home(database_url) as made:
        yield made


@pytest.fixture
async def served(settings: Settings, host: FakeHost) -> AsyncIterator[Served]:
    async with serving(settings) as made:
        yield made


async def fork(caller: Caller, source: str = "web", count: int = 1, ttl_s: float = 600) -> Any:
    return await caller.call("Fork", pb.ForkRequest(source=source, count=count, ttl_s=ttl_s))


async def test_the_same_answer_and_one_machine(served: Served, host: FakeHost) -> None:
    async with served.client(idempotency_key="one") as caller:
        first = (await caller.run_all("web"))[-1]
        again = await caller.run_all("web")
        assert again == [first]
        forked = await fork(caller)
        assert await fork(caller) == forked
        for other in ({"count": 2}, {"ttl_s": 60}):
            with pytest.raises(errors.InvalidRequest, match="new key"):
                await fork(caller, **other)
    async with served.client(idempotency_key="two") as caller:
        assert (await fork(caller)).children[0].machine.name == "web-2"
    assert len(host.machines) == 3


async def test_keys_of_different_callers_have_nothing_in_common(served: Served) -> None:
    async with served.client(idempotency_key="one") as caller:
        await caller.run_all("web")
    async with served.client(await served.token(), idempotency_key="one") as other:
        await other.run_all("web-of-theirs")
    for bad in ("", "x" * 129):
        async with served.client(idempotency_key=bad) as caller:
            with pytest.raises(errors.InvalidRequest, match="printable"):
                await caller.run_all("more")


async def test_the_second_joins_the_first_that_is_under_way(served: Served, host: FakeHost) -> None:
    async with served.client() as caller:
        await caller.run_all("web")
    stall = host.stall("ForkMachine")
    async with served.client(idempotency_key="one") as caller, served.client(idempotency_key="one") as again:
        first = asyncio.create_task(fork(caller))
        await stall.reached.wait()
        second = asyncio.create_task(fork(again))
        await asyncio.sleep(0.1)
        assert not second.done()
        stall.go.set()
        assert await first == await second
    assert len(host.calls["ForkMachine"]) == 1
    assert len(host.machines) == 2
    # What writes down no intent, too.
    async with served.client(idempotency_key="two") as caller:
        snapshot = (await caller.call("GetMachine", pb.MachineRequest(machine="web"))).snapshot
        await caller.call("TagSnapshot", pb.TagSnapshotRequest(snapshot=snapshot, tag="base"))
        request = pb.UntagSnapshotRequest(tag="base")
        untagged = await asyncio.gather(*(caller.call("UntagSnapshot", request) for _ in range(3)))
        assert [each.id for each in untagged] == [snapshot] * 3


async def test_what_failed_is_tried_anew(served: Served, host: FakeHost) -> None:
    async with served.client(idempotency_key="one") as caller:
        await caller.run_all("web")
        host.fail("ForkMachine", errors.ResourceExhausted("no memory"))
        with pytest.raises(errors.ResourceExhausted):
            await fork(caller)
        assert len((await fork(caller)).children) == 1
        assert len(host.machines) == 2


async def test_what_is_done_is_not_told_to_have_failed(
    served: Served, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's disk is full by the time that the answer is to be kept."""

    async def full(*_: Any) -> None:
        raise errors.ResourceExhausted("the disk is full")

    async with served.client(idempotency_key="one") as caller:
        await caller.run_all("web")
        monkeypatch.setattr(answers, "keep", full)
        forked = await fork(caller)
        assert (await fork(caller)).children[0].machine.id == forked.children[0].machine.id
        assert len(host.machines) == 2
    async with served.client(idempotency_key="two") as caller:
        assert (await caller.run_all("other"))[-1].result.machine.name == "other"


async def test_a_caller_that_left_and_asks_again(served: Served, host: FakeHost) -> None:
    """Its first run is undone, or done; the second never makes another machine beside it."""
    async with served.client(idempotency_key="template") as caller:
        await caller.run_all("base")
    for moment in ("stalled", "done"):
        stall = host.stall("ForkSnapshot")
        name = f"web-{moment}"
        async with served.client(idempotency_key=name) as caller:
            leaving = asyncio.create_task(caller.run_all(name))
            await stall.reached.wait()
            if moment == "done":
                stall.go.set()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
        async with served.client(idempotency_key=name) as caller:
            again = asyncio.create_task(caller.run_all(name))
            await asyncio.sleep(0.1)
            stall.go.set()
            result = (await again)[-1].result
            assert result.machine.name == name
            assert (await caller.run_all(name))[-1].result.machine.id == result.machine.id
        host.stalls.clear()
        machines = [machine for machine in host.machines.values() if machine.name == name]
        assert [machine.id for machine in machines] == [result.machine.id]


async def test_after_a_restart_the_answer_is_the_same(of_either_engine: Settings) -> None:
    settings = of_either_engine
    async with running_host(settings) as host:
        async with serving(settings) as served, served.client(await served.token(), idempotency_key="one") as caller:
            ran, forked = (await caller.run_all("web"))[-1], await fork(caller)
            metadata = caller.metadata
        async with serving(settings) as served, served.client() as caller:
            caller.metadata = metadata
            assert await caller.run_all("web") == [ran]
            assert await fork(caller) == forked
            with pytest.raises(errors.InvalidRequest):
                await fork(caller, count=3)
        assert len(host.machines) == 2


async def test_changes_are_not_carried_out_again(of_either_engine: Settings) -> None:
    """Their answers are written with their ends, in one transaction."""
    web = pb.MachineRequest(machine="web")
    async with running_host(of_either_engine) as host, serving(of_either_engine) as served:
        async with served.client() as caller:
            await caller.run_all("web")
        async with served.client(idempotency_key="one") as caller:
            paused = await caller.call("PauseMachine", web)
            async with served.client() as other:
                await other.call("ResumeMachine", web)
            assert await caller.call("PauseMachine", web) == paused
            assert len(host.calls["PauseMachine"]) == 1
            for _ in range(2):
                assert await caller.call("RemoveMachine", web) == common_pb2.Empty()
            with pytest.raises(errors.InvalidRequest, match="new key"):
                await caller.call("RemoveMachine", pb.MachineRequest(machine="other"))
        assert not host.machines


async def test_answered_from_what_it_made_when_the_answer_was_not_kept(
    settings: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the controller is killed between the two transactions."""

    async def not_kept(*_: Any) -> None:
        pass

    monkeypatch.setattr(answers, "keep", not_kept)
    async with serving(settings) as served, served.client(idempotency_key="one") as caller:
        ran, forked = (await caller.run_all("web"))[-1].result, await fork(caller)
        taken = await caller.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="base"))
    async with serving(settings) as served, served.client(idempotency_key="one") as caller:
        assert (await caller.run_all("web"))[-1].result.machine.id == ran.machine.id
        again = await fork(caller)
        [child], [before] = again.children, forked.children
        assert (child.machine.id, child.machine.expires_us) == (before.machine.id, before.machine.expires_us)
        assert (again.snapshot.id, again.parent) == (forked.snapshot.id, forked.parent)
        assert (await caller.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="base"))).id == taken.id
        with pytest.raises(errors.InvalidRequest):
            await fork(caller, count=3)
    async with serving(settings) as served:
        async with served.client() as caller:
            await caller.call("RemoveMachine", pb.MachineRequest(machine="web-1"))
        async with served.client(idempotency_key="one") as caller:
            with pytest.raises(errors.NotFound, match="removed since"):
                await fork(caller)


async def test_a_controller_that_ends_before_the_host_has_done_it(settings: Settings, host: FakeHost) -> None:
    """The next one undoes what was begun, and the request is carried out anew, once."""
    async with serving(settings) as served, served.client(idempotency_key="one") as caller:
        await caller.run_all("web")
        stall = host.stall("ForkMachine")
        forking = asyncio.create_task(fork(caller))
        await stall.reached.wait()
    with contextlib.suppress(errors.ForkyError, asyncio.CancelledError):
        await forking
    host.stalls.clear()
    async with serving(settings) as served, served.client(idempotency_key="one") as caller:
        made = await fork(caller)
        assert [child.machine.name for child in made.children] == ["web-1"]
        assert len((await caller.call("ListMachines")).machines) == len(host.machines) == 2


async def test_the_client_goes_on_when_the_controller_is_killed(settings: Settings, host: FakeHost) -> None:
    """kill -9 in the middle of a fork that the host has done; the SDK asks the next controller: there is one child."""
    daemon = Daemon(settings)
    await daemon.start()
    try:
        await eventually(lambda: _exists(settings), 50)
        async with Forky(settings.home, start=False, token="", tenant="") as forky:
            web = await forky.run(name="web")
            stall = host.stall("ForkMachine")
            forking = asyncio.create_task(web.fork(1))
            await stall.reached.wait()
            await daemon.kill()
            host.stalls.clear()
            await host._do_ForkMachine(host.calls["ForkMachine"][0])
            await daemon.start()
            made = (await asyncio.wait_for(forking, 50)).children
            assert [machine.name for machine in await forky.list()] == ["web", "web-1"]
            assert len(host.machines) == 2
            assert made[0].id in host.machines
    finally:
        await daemon.kill()


async def _exists(settings: Settings) -> bool:
    return settings.socket("controller").exists()


async def test_the_client_goes_on_when_its_connection_breaks(served: Served, host: FakeHost) -> None:
    """A front between the two is closed in the middle of a fork, and of a run."""
    path = served.settings.run / "front.sock"
    writers: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_unix_connection(served.settings.socket("controller"))
        writers.extend((writer, to_far))
        await asyncio.gather(_copy(reader, to_far), _copy(far, writer))

    front = await asyncio.start_unix_server(pass_on, path)
    async with Forky("/nonexistent", controller=f"unix:{path}", token="", tenant="") as forky:
        web = await forky.run(name="web")
        for method, work in (("ForkMachine", web.fork(1)), ("ForkSnapshot", forky.run(name="two"))):
            stall = host.stall(method)
            working = asyncio.create_task(work)
            await stall.reached.wait()
            for writer in writers:
                writer.transport.abort()
            writers.clear()
            host.stalls.clear()
            stall.go.set()
            await asyncio.wait_for(working, 20)
        assert sorted(machine.name for machine in await forky.list()) == ["two", "web", "web-1"]
        assert len(host.machines) == 3
    front.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_a_thousand_at_once_and_who_leaves_leaves_nothing(served: Served, host: FakeHost) -> None:
    text = await served.token("user")
    async with served.client(text) as caller, served.client(text) as leaver:
        await caller.run_all("web")
        request = pb.MachineRequest(machine="web")
        calls = [caller.call("GetMachine", request) for _ in range(1000)]
        assert {machine.name for machine in await asyncio.gather(*calls)} == {"web"}
        stall = host.stall("ForkSnapshot")
        leaving = asyncio.create_task(leaver.run_all("left"))
        await stall.reached.wait()
        leaving.cancel()

        async def only_web() -> bool:
            return [m.name for m in (await caller.call("ListMachines")).machines] == ["web"] and len(host.machines) == 1

        await eventually(only_web)


async def test_too_many_requests_say_when_to_try_again(settings: Settings, host: FakeHost) -> None:
    limited = Settings(home=settings.home, rate_per_s=0.01, rate_burst=3)
    async with serving(limited) as served, served.client(await served.token()) as caller:
        for _ in range(3):
            await caller.call("ListMachines")
        with pytest.raises(errors.TooManyRequests, match=r"try again in 9\d\.\d\d s"):
            await caller.call("ListMachines")
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await caller.stub.ListMachines(common_pb2.Empty(), **caller.options)
        trailing = dict(raw.value.trailing_metadata() or ())
        assert 90_000 < int(str(trailing["grpc-retry-pushback-ms"])) <= 100_000
        async with served.client(await served.token()) as other:
            await other.call("ListMachines")
        async with served.client() as operator:
            for _ in range(5):
                await operator.call("ListMachines")
