"""What the controller makes of a crash, a host that goes away, and a database that can't be written."""

import asyncio
import contextlib
import json
import resource
import signal
import sqlite3
from typing import Any

import pytest

from forkypig import errors
from forkypig.controller import reconciler
from forkypig.controller.journal import Journal
from forkypig.daemon.settings import Settings
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from tests.component.controller_rig import Client, Daemon, daemon, eventually, running_host, serving
from tests.component.fake_host import CREATING, FAILED, IMAGE, RUNNING, FakeHost


def states(machines: dict[str, common.Machine]) -> dict[str, str]:
    return {name: common.MachineState.Name(m.state).removeprefix("MACHINE_STATE_") for name, m in machines.items()}


async def settled(client: Client, want: dict[str, str]) -> None:
    async def as_wanted() -> bool:
        return states(await client.machines()) == want

    with contextlib.suppress(TimeoutError):
        await eventually(as_wanted)
    assert states(await client.machines()) == want


async def all_leased(client: Client, *names: str) -> bool:
    """Who finished what a killed one had begun has given them the leases that were asked for."""
    there = await client.machines()
    return all(there[name].expires_us for name in names)


async def crash_in(settings: Settings, host: FakeHost, method: str, call: Any, before: Any = None) -> Any:
    """Kills a controller whose `call` has come as far as the host's `method`; returns what the host was asked."""
    async with daemon(settings) as (process, client):
        if before is not None:
            await before(client)
        stall = host.stall(method)
        asked = asyncio.create_task(call(client))
        await stall.reached.wait()
        await process.kill()
        with pytest.raises(errors.ForkyError):
            await asked
    del host.stalls[method]
    return host.calls[method][-1]


async def run_web(client: Client) -> None:
    await client.run("web")


# -- kill -9 between the intent and its result -------------------------------------------------------------------------


@pytest.mark.parametrize("host_did", ["nothing", "all", "a wreck"])
async def test_killed_while_it_runs_a_machine(settings: Settings, host: FakeHost, host_did: str) -> None:
    request = await crash_in(settings, host, "BootMachine", lambda c: c.run("web", cold_boot=True, ttl_s=600))
    if host_did != "nothing":
        machine = await host._do_BootMachine(request)
        machine.state = RUNNING if host_did == "all" else FAILED
    async with serving(settings) as client:
        await settled(client, {"web": "RUNNING"} if host_did == "all" else {})
        assert set(host.machines) == ({request.machine} if host_did == "all" else set())
        if host_did == "all":
            assert (await client.machines())["web"].id == request.machine
            assert (await client.machines())["web"].image_name == "debian-12"
            await eventually(lambda: all_leased(client, "web"))


async def test_killed_while_the_host_goes_on(
    settings: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "_AGAIN_S", 0.1)
    request = await crash_in(settings, host, "BootMachine", lambda c: c.run("web", cold_boot=True))
    assert "RunMachine" not in (settings.audit / "audit.jsonl").read_text()
    (await host._do_BootMachine(request)).state = CREATING
    async with serving(settings) as client:
        await asyncio.sleep(0.4)
        assert states(await client.machines()) == {"web": "CREATING"}
        # What the killed one did not live to write down the next one tells.
        told = [json.loads(line) for line in (settings.audit / "audit.jsonl").read_text().splitlines()]
        assert [(line["who"], line["about"], line["result"]) for line in told if "RunMachine" in line["method"]] == [
            ("operator", "name=web", "INTERRUPTED")
        ]
        host.change(request.machine, state=RUNNING)
        await settled(client, {"web": "RUNNING"})


@pytest.mark.parametrize("host_did", ["nothing", "the split", "one child", "all"])
async def test_killed_while_it_forks(settings: Settings, host: FakeHost, host_did: str) -> None:
    request = await crash_in(settings, host, "ForkMachine", lambda c: c.fork("web", 3, ttl_s=600), before=run_web)
    if host_did != "nothing":
        made = await host._do_ForkMachine(request)
        kept = {"the split": 0, "one child": 1, "all": 3}[host_did]
        for child in made.children[kept:]:
            del host.machines[child.machine.id]
    async with serving(settings) as client:
        children = {"web-1": "RUNNING", "web-2": "RUNNING", "web-3": "RUNNING"} if host_did == "all" else {}
        await settled(client, {"web": "RUNNING", **children})
        web = (await client.machines())["web"]
        assert web.snapshot == host.machines[web.id].snapshot
        assert (request.snapshot in await client.snapshots()) == (host_did != "nothing")
        assert len(host.machines) == 1 + len(children)
        await eventually(lambda: all_leased(client, *children))
        assert (await client.fork("web", 1)).children[0].machine.name == ("web-4" if children else "web-1")


async def test_killed_while_it_removes(settings: Settings, host: FakeHost) -> None:
    await crash_in(settings, host, "RemoveMachine", lambda c: c.machine("RemoveMachine", "web"), before=run_web)
    assert len(host.machines) == 1
    async with serving(settings) as client:
        await settled(client, {})
        assert host.machines == {}


async def test_killed_while_it_takes_a_snapshot_or_removes_one(settings: Settings, host: FakeHost) -> None:
    take = pb.TakeSnapshotRequest(machine="web", tag="base")
    request = await crash_in(settings, host, "ForkMachine", lambda c: c.call("TakeSnapshot", take), before=run_web)
    await host._do_ForkMachine(request)
    async with serving(settings) as client:

        async def is_there() -> bool:
            return request.snapshot in await client.snapshots()

        await eventually(is_there)
        assert states(await client.machines()) == {"web": "RUNNING"}
        assert (await client.snapshots())[request.snapshot].tag == "base"
        assert (await client.machines())["web"].snapshot == request.snapshot
        await client.machine("RemoveMachine", "web")
    remove = pb.SnapshotRequest(snapshot="base")
    await crash_in(settings, host, "RemoveSnapshot", lambda c: c.call("RemoveSnapshot", remove))
    async with serving(settings) as client:

        async def is_gone() -> bool:
            return request.snapshot not in await client.snapshots()

        await eventually(is_gone)
        assert request.snapshot not in host.snapshots


async def test_killed_while_it_makes_a_template(settings: Settings, host: FakeHost) -> None:
    request = await crash_in(settings, host, "MakeTemplate", lambda c: c.run("web"))
    await host._do_MakeTemplate(request)
    async with serving(settings) as client:
        await settled(client, {})
        web = await client.run("web")
        assert web.snapshot == request.snapshot
        assert len(host.calls["MakeTemplate"]) == 1


async def test_ended_in_peace_it_leaves_intents_for_the_next(settings: Settings, host: FakeHost) -> None:
    async with daemon(settings) as (process, client):
        await run_web(client)
        stall = host.stall("ForkMachine")
        asked = asyncio.create_task(client.fork("web", 2))
        await stall.reached.wait()
        assert process.process is not None
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.NotPossibleNow, match="controller is ending"):
            await asked
        async with asyncio.timeout(30):
            assert await process.process.wait() == 0
    del host.stalls["ForkMachine"]
    await host._do_ForkMachine(host.calls["ForkMachine"][-1])
    async with serving(settings) as client:
        await settled(client, {"web": "RUNNING", "web-1": "RUNNING", "web-2": "RUNNING"})


async def test_who_is_cancelled_together_with_the_work_that_they_wait_for_ends() -> None:
    """As a pool's filler is when the controller ends."""
    async with asyncio.TaskGroup() as tasks:
        journal = Journal(tasks)

        async def keep() -> None:
            while True:
                with contextlib.suppress(errors.NotPossibleNow):
                    await journal.carry(asyncio.Event().wait())

        keeping = tasks.create_task(keep())
        while not journal._work:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        [work] = journal._work
        work.cancel()
        keeping.cancel()
        await asyncio.wait({keeping}, timeout=1)
        went_on = {task for task in journal._work if not task.done()}
        for task in (keeping, *went_on):  # or this would not end
            task.cancel()
    assert not went_on


async def test_restart_keeps_everything(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        await client.run("web")
        await client.fork("web", 2)
        await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web-1", tag="base"))

        async def successors_are_known() -> bool:
            """The host tells of a split's successor beside its answer."""
            known = {machine.id: machine.qemu_pid for machine in (await client.machines()).values()}
            return known == {machine.id: machine.qemu_pid for machine in host.machines.values()}

        await eventually(successors_are_known)
        before = (await client.machines(), await client.snapshots(), await client.events())
    async with serving(settings) as client:
        await asyncio.sleep(0.3)
        assert (await client.machines(), await client.snapshots(), await client.events()) == before
        assert len((await client.call("ListImages")).images) == 1


# -- a host that goes away ---------------------------------------------------------------------------------------------


async def test_without_hostd_it_answers_and_says_what_to_do(settings: Settings) -> None:
    async with serving(settings) as client:
        assert "forky up" in (await client.call("GetStatus")).hostd_error
        assert await client.machines() == {}
        with pytest.raises(errors.HostUnreachable, match="forky up"):
            await client.run("web")
        assert await client.machines() == {}
        async with running_host(settings):

            async def runs() -> bool:
                with contextlib.suppress(errors.HostUnreachable):
                    return bool(await client.run("web"))
                return False

            await eventually(runs)


async def test_hostd_that_dies_during_a_fork(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        await client.run("web")
        stall = host.stall("ForkMachine")
        asked = asyncio.create_task(client.fork("web", 2))
        await stall.reached.wait()
        await host.stop()
        with pytest.raises(errors.HostUnreachable, match="forky up"):
            await asked
        # It had got as far as the split and one child.
        made = await host._do_ForkMachine(host.calls["ForkMachine"][0])
        del host.machines[made.children[1].machine.id]
        del host.stalls["ForkMachine"]
        await host.start()
        await settled(client, {"web": "RUNNING"})
        assert list(host.machines) == [made.parent]
        assert (await client.machines())["web"].snapshot == made.snapshot.id
        assert len((await client.fork("web", 2)).children) == 2


async def test_machines_found_and_lost(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        await client.run("web")
        web = (await client.machines())["web"]
    host._machine("m-00000000cafe", "web", RUNNING, image=IMAGE.id, shape=web.shape, snapshot=web.snapshot)
    del host.machines[web.id]
    async with serving(settings) as client:
        await settled(client, {"web": "FAILED", "web-2": "RUNNING"})
        every = await client.machines()
        assert every["web-2"].id == "m-00000000cafe"
        assert "forky rm" in every["web"].failure
        await client.machine("RemoveMachine", "web")


async def test_machine_of_an_undone_run_that_turns_up_late_is_removed(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        host.fail("BootMachine", errors.MachineFailed("QEMU refused"))
        with pytest.raises(errors.MachineFailed):
            await client.run("web", cold_boot=True)
        late = host.calls["BootMachine"][0]
        host._machine(late.machine, late.name, RUNNING, image=late.image, shape=late.shape)

        async def is_gone() -> bool:
            return not host.machines

        await eventually(is_gone)
        assert await client.machines() == {}


# -- the database ------------------------------------------------------------------------------------------------------


async def test_locked_database_is_told_and_gone_through(
    settings: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forkypig.controller.store import sqlite

    configure = sqlite.configure
    monkeypatch.setattr(sqlite, "configure", lambda connection, _timeout: configure(connection, 0.2))
    async with serving(settings) as client:
        await client.run("web")
        other = sqlite3.connect(settings.database, isolation_level=None, check_same_thread=False)
        # In a thread: a transaction of the controller may have to end first, and it runs in this loop.
        await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
        assert "web" in await client.machines()  # reading goes on
        with pytest.raises(errors.NotPossibleNow, match="locked by another process"):
            await client.fork("web", 1)
        other.execute("ROLLBACK")
        other.close()
        assert len((await client.fork("web", 1)).children) == 1


async def test_database_that_cannot_grow_is_told_and_gone_through(settings: Settings, host: FakeHost) -> None:
    async with daemon(settings) as (process, client):
        await client.run("web")
        assert process.process is not None
        none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1024, none[1]))
        with pytest.raises(errors.ResourceExhausted, match=r"controller\.db can't be written"):
            await client.fork("web", 100)
        assert set(await client.machines()) == {"web"}
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, none)
        assert len((await client.fork("web", 100)).children) == 100


async def test_fork_whose_result_cannot_be_written_is_undone(
    settings: Settings, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "_AGAIN_S", 0.1)
    async with daemon(settings) as (process, client):
        await client.run("web")
        stall = host.stall("ForkMachine")
        asked = asyncio.create_task(client.fork("web", 50))
        await stall.reached.wait()
        assert process.process is not None
        none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1024, none[1]))
        stall.go.set()
        with pytest.raises(errors.ResourceExhausted, match="can't be written"):
            await asked
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, none)
        await settled(client, {"web": "RUNNING"})

        async def host_agrees() -> bool:
            return len(host.machines) == 1

        await eventually(host_agrees)


async def test_damaged_database_and_second_controller_end_with_one_line(settings: Settings) -> None:
    async with daemon(settings):
        second = await Daemon(settings).start()
        _, said = await asyncio.wait_for(second.communicate(), 60)
        assert second.returncode == 1
        assert said.decode().count("\n") == 1
        assert "running already" in said.decode()
    for suffix in ("", "-wal", "-shm"):
        settings.database.with_name(settings.database.name + suffix).unlink(missing_ok=True)
    settings.database.write_bytes(b"this is not a database, and long enough to be looked at as one" * 100)
    third = await Daemon(settings).start()
    _, said = await asyncio.wait_for(third.communicate(), 60)
    assert third.returncode == 1
    assert "is damaged" in said.decode().splitlines()[-1]
    assert "Traceback" not in said.decode()
