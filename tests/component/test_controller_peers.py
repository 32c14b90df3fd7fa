"""Several controllers on one PostgreSQL and one host: no operation is lost, and none is done twice."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from forkypig import errors
from forkypig.controller import peers
from forkypig.daemon.settings import Settings
from forkypig.v1 import controller_pb2 as pb
from tests.component.controller_rig import Client, Daemon, daemon, eventually, home, running_host, serving
from tests.component.fake_host import RUNNING, FakeHost
from tests.component.postgres_rig import Postgres

# Another goes on within 5 s on a host that has a core to spare, which a host that runs tests may not have.
GOES_ON_S = 40.0


@pytest.fixture
def first(emptied: str) -> Iterator[Settings]:
    with home(emptied) as made:
        yield made


@pytest.fixture
def second(first: Settings) -> Iterator[Settings]:
    """Another home, with the first one's database and host."""
    with home(first.database_url, str(first.socket("hostd"))) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both controllers are in this process, which may stand still for a while: nobody is to be taken for dead."""
    monkeypatch.setattr(peers, "_LIVES_S", 60.0)


@pytest_asyncio.fixture
async def host(first: Settings) -> AsyncIterator[FakeHost]:
    async with running_host(first) as fake:
        yield fake


def process_of(running: Daemon) -> asyncio.subprocess.Process:
    assert running.process is not None
    return running.process


async def names(client: Client) -> set[str]:
    return {name for name, machine in (await client.machines()).items() if machine.state == RUNNING}


@pytest.mark.usefixtures("patient")
async def test_two_at_once_see_one_state(first: Settings, second: Settings, host: FakeHost) -> None:
    async with serving(first) as one, serving(second) as other:
        web = await one.run("web")
        assert (await other.machines())["web"].id == web.id
        made = await asyncio.gather(
            *(client.fork("web", 2) for client in (one, other) for _ in range(4)), return_exceptions=True
        )
        assert not [m for m in made if isinstance(m, BaseException)]
        assert await names(one) == await names(other) == {"web", *(f"web-{n}" for n in range(1, 17))}
        assert len(host.machines) == 17
        with pytest.raises(errors.AlreadyExists):
            await other.run("web")
        # What the follower leaves behind, the leader collects.
        for name in await names(one):
            await other.machine("RemoveMachine", name)

        async def collected() -> bool:
            return len(host.snapshots) == 1  # the template

        await eventually(collected, GOES_ON_S)
        assert len({str(c.machine) for c in host.calls["RemoveMachine"]}) == len(host.calls["RemoveMachine"]) == 17


@pytest.mark.usefixtures("patient")
async def test_one_template_is_made_whoever_wants_it(first: Settings, second: Settings, host: FakeHost) -> None:
    async with serving(first) as one, serving(second) as other:
        stall = host.stall("MakeTemplate")
        runs = [asyncio.create_task(one.run("a"))]
        await stall.reached.wait()
        runs.append(asyncio.create_task(other.run("b")))
        await asyncio.sleep(0.5)
        assert len(host.calls["MakeTemplate"]) == 1
        stall.go.set()
        a, b = await asyncio.gather(*runs)
        assert len(host.calls["MakeTemplate"]) == 1
        assert a.snapshot == b.snapshot


@pytest.mark.usefixtures("patient")
async def test_operation_of_another_is_left_alone_and_shown(first: Settings, second: Settings, host: FakeHost) -> None:
    async with serving(first) as leader, serving(second) as follower:
        await leader.run("web")
        stall = host.stall("ForkMachine")
        forking = asyncio.create_task(follower.fork("web", 2))
        await stall.reached.wait()
        assert (await leader.machines())["web"].operation == "forking"
        # The leader looks at everything while the follower is at it.
        host._machine("m-00000000cafe", "stray", RUNNING)

        async def adopted() -> bool:
            return "stray" in await leader.machines()

        await eventually(adopted, GOES_ON_S)
        stall.go.set()
        assert len((await forking).children) == 2
        assert await names(leader) == {"web", "web-1", "web-2", "stray"}


@pytest.mark.usefixtures("patient")
async def test_follower_has_a_failure_undone_by_the_leader(first: Settings, second: Settings, host: FakeHost) -> None:
    async with serving(first) as leader, serving(second) as follower:
        await leader.run("web")
        host.fail("children", errors.MachineFailed("QEMU refused"))
        with pytest.raises(errors.MachineFailed):
            await follower.fork("web", 2)
        assert await names(leader) == {"web"}
        web = (await leader.machines())["web"]
        assert web.snapshot == host.machines[web.id].snapshot  # it split all the same


@pytest.mark.parametrize("method", ["run", "fork"])
async def test_killed_leader_is_followed(first: Settings, second: Settings, host: FakeHost, method: str) -> None:
    async with daemon(first) as (leader, client), serving(second) as follower:
        await client.run("web")
        stall = host.stall("BootMachine" if method == "run" else "ForkMachine")
        call = client.run("other", cold_boot=True) if method == "run" else client.fork("web", 2)
        asked = asyncio.create_task(call)
        await stall.reached.wait()
        await leader.kill()
        with pytest.raises(errors.ForkyError):
            await asked
        # As hostd does, the host goes on to the end though its caller is gone.
        stall.go.set()
        if method == "run":
            want = {"web", "other"}
            await host._do_BootMachine(host.calls["BootMachine"][-1])
        else:
            want = {"web", "web-1", "web-2"}
            await host._do_ForkMachine(host.calls["ForkMachine"][-1])

        async def finished() -> bool:
            return await names(follower) == want

        await eventually(finished, GOES_ON_S)
        assert {m.name for m in host.machines.values()} == want
        assert len((await follower.fork("web", 1)).children) == 1  # nothing is held any more


async def test_killed_follower_is_cleaned_up_after(first: Settings, second: Settings, host: FakeHost) -> None:
    async with serving(first) as leader, daemon(second) as (follower, client):
        await leader.run("web")
        stall = host.stall("ForkMachine")
        asked = asyncio.create_task(client.fork("web", 3))
        await stall.reached.wait()
        await follower.kill()
        with pytest.raises(errors.ForkyError):
            await asked
        assert set(await leader.machines()) == {"web", "web-1", "web-2", "web-3"}

        async def undone() -> bool:
            return set(await leader.machines()) == {"web"}

        await eventually(undone, GOES_ON_S)


async def test_leader_that_stood_still_does_nothing_twice(first: Settings, second: Settings, host: FakeHost) -> None:
    async with daemon(first) as (leader, client), serving(second) as follower:
        await client.run("web")
        stall = host.stall("BootMachine")
        asked = asyncio.create_task(client.run("other", cold_boot=True))
        await stall.reached.wait()
        process_of(leader).send_signal(signal.SIGSTOP)
        try:

            async def undone() -> bool:
                return set(await follower.machines()) == {"web"}

            await eventually(undone, GOES_ON_S)
            # A machine of the same name, by another: the late one must not touch it.
            del host.stalls["BootMachine"]
            mine = await follower.run("other", cold_boot=True)
        finally:
            process_of(leader).send_signal(signal.SIGCONT)
        stall.go.set()  # the old call succeeds only now
        with pytest.raises(errors.NotPossibleNow, match=r"stood still|declared dead"):
            await asked

        async def only_mine() -> bool:
            return {m.id for m in host.machines.values() if m.name == "other"} == {mine.id}

        await eventually(only_mine, GOES_ON_S)
        assert (await follower.machines())["other"].id == mine.id

        # It has joined again, and works.
        async def works() -> bool:
            with contextlib.suppress(errors.NotPossibleNow):
                return len((await client.fork("web", 1)).children) == 1
            return False

        await eventually(works, GOES_ON_S)


async def test_host_refuses_the_late_calls_of_the_dead(first: Settings, second: Settings, host: FakeHost) -> None:
    from forkypig.controller.host import Host
    from forkypig.model import MachineId

    async with serving(second) as client:
        web = await client.run("web")
        late = Host(first.socket("hostd"))
        try:
            late.stamp = (("forky-controller", "late"), ("forky-fencing", "7"))
            await late.pause(MachineId(web.id))
            await host.fences.raise_to("late", 8)
            for call in (late.pause(MachineId(web.id)), late.remove_machine(MachineId(web.id)), late.images()):
                with pytest.raises(errors.NotPossibleNow, match="declared dead"):
                    await call
            with pytest.raises(errors.NotPossibleNow, match="declared dead"):
                await anext(late.watch())
            # A host that is started again has not forgotten.
            await host.stop()
            await host.start()

            async def refused() -> bool:
                with contextlib.suppress(errors.HostUnreachable):  # the channel has seen it gone
                    with pytest.raises(errors.NotPossibleNow, match="declared dead"):
                        await late.remove_machine(MachineId(web.id))
                    return True
                return False

            await eventually(refused)
            late.stamp = (("forky-controller", "late"), ("forky-fencing", "many"))
            with pytest.raises(errors.InvalidRequest):
                await late.images()
            late.stamp = (("forky-controller", "late"), ("forky-fencing", "8"))
            assert await late.images()
        finally:
            await late.close()
        assert web.id in host.machines


async def test_database_that_is_gone_for_a_while(first: Settings, server: Postgres, host: FakeHost) -> None:
    async with serving(first) as client:
        await client.run("web")
        stall = host.stall("ForkMachine")
        asked = asyncio.create_task(client.fork("web", 2))
        await stall.reached.wait()
        server.stop()
        try:
            with pytest.raises(errors.HostUnreachable, match=r"database .* can't be reached.*machines run on"):
                await client.machines()
            with pytest.raises(errors.HostUnreachable, match="can't be reached"):
                await client.machine("PauseMachine", "web")
            stall.go.set()
            del host.stalls["ForkMachine"]
            with pytest.raises(errors.HostUnreachable):
                await asked  # its result could not be written
            assert len(host.machines) == 3
        finally:
            server.start()

        async def undone() -> bool:
            with contextlib.suppress(errors.HostUnreachable):
                return await names(client) == {"web"} and len(host.machines) == 1
            return False

        await eventually(undone, GOES_ON_S)
        assert len((await client.fork("web", 2)).children) == 2


async def test_no_server_wrong_database_and_what_is_no_url(first: Settings, server: Postgres) -> None:
    from forkypig.controller.store import Store

    for url, error, words in (
        (f"postgresql://forky@/postgres?host={first.home}", errors.HostUnreachable, "can't be reached"),
        (server.url("nowhere"), errors.InvalidRequest, "there is no database"),
        (server.url("postgres").replace("forky@", "stranger:secret@"), errors.InvalidRequest, "refuses the login"),
        ("mysql://root@localhost/forky", errors.InvalidRequest, r"mysql.*postgresql://"),
        ("nonsense", errors.InvalidRequest, "is not a database's URL"),
    ):
        with pytest.raises(error, match=words) as caught:
            await Store.open(url)
        assert "secret" not in str(caught.value)


async def test_pages(first: Settings, host: FakeHost) -> None:
    async with serving(first) as client:
        await client.run("web")
        await client.fork("web", 9)
        turned: list[Any] = []
        token = ""
        while True:
            request = pb.ListMachinesRequest(page_size=4, page_token=token)
            answer = await client.call("ListMachines", request)
            turned += answer.machines
            assert len(answer.machines) <= 4
            if not (token := answer.next_page_token):
                break
        assert [m.id for m in turned] == [
            m.id for m in (await client.call("ListMachines", request.__class__())).machines
        ]
        begun = await client.call("ListMachines", pb.ListMachinesRequest(name_prefix="web-"))
        assert {m.name for m in begun.machines} == {f"web-{n}" for n in range(1, 10)}
        for wrong in (
            pb.ListMachinesRequest(page_token="1/../../x"),
            pb.ListMachinesRequest(page_size=1_000_000),
            pb.ListMachinesRequest(name_prefix="a\0b"),
        ):
            with pytest.raises(errors.InvalidRequest):
                await client.call("ListMachines", wrong)
