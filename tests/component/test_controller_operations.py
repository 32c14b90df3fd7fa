"""The controller's API against a fake host, over real sockets: what is made, named, refused, undone and collected."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forkypig import Forky, errors
from forkypig.daemon.settings import Settings
from forkypig.v1 import agent_pb2
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire.status import rpc_errors
from tests.component.controller_rig import Client, eventually, home
from tests.component.fake_host import FAILED, IMAGE, PAUSED, RUNNING, STOPPED, FakeHost


@pytest.fixture
def settings(database_url: str) -> Any:
    with home(database_url) as made:
        yield made


# -- run ---------------------------------------------------------------------------------------------------------------


async def test_first_run_makes_a_template_and_later_ones_use_it(client: Client, host: FakeHost) -> None:
    updates = await client.run_all("web")
    assert [u.progress.step for u in updates[:-1]] == ["booting the template", "starting"]
    web = updates[-1].result.machine
    assert (web.name, web.state, web.image_name) == ("web", RUNNING, "debian-12")
    assert updates[-1].result.ready_ms > 0
    template = host.calls["MakeTemplate"][0].snapshot
    assert web.snapshot == template
    other = await client.run("other")
    assert other.snapshot == template
    assert len(host.calls["MakeTemplate"]) == 1
    assert (await client.snapshots())[template].kind == common.SNAPSHOT_KIND_TEMPLATE


async def test_runs_at_once_share_one_template(client: Client, host: FakeHost) -> None:
    made = await asyncio.gather(*(client.run() for _ in range(8)))
    assert len({m.name for m in made}) == 8
    assert len(host.calls["MakeTemplate"]) == 1


async def test_another_shape_or_qemu_gets_another_template(client: Client, host: FakeHost) -> None:
    await client.run("a")
    await client.run("b", shape=common.Shape(memory_mib=1024))
    assert len(host.calls["MakeTemplate"]) == 2
    host.qemu_build = "qemu 7.2 build 2"
    c = await client.run("c")
    assert len(host.calls["MakeTemplate"]) == 3
    # The old template of that shape goes when its machine does, and not before.
    old = host.calls["MakeTemplate"][0].snapshot
    assert old in await client.snapshots()
    await client.machine("RemoveMachine", "a")

    async def is_gone() -> bool:
        return old not in await client.snapshots()

    await eventually(is_gone)
    assert c.snapshot in host.snapshots


async def test_template_that_the_host_lost_is_made_anew(client: Client, host: FakeHost) -> None:
    first = await client.run("a")
    del host.snapshots[first.snapshot]
    second = await client.run("b")
    assert second.snapshot != first.snapshot
    assert second.state == RUNNING


async def test_cold_boot_uses_no_template(client: Client, host: FakeHost) -> None:
    machine = await client.run("cold", cold_boot=True)
    assert machine.snapshot == ""
    assert not host.calls["MakeTemplate"]


async def test_missing_default_image_is_built(client: Client, host: FakeHost) -> None:
    host.images.clear()
    await client.call("ListImages")
    updates = await client.run_all("web")
    assert updates[0].progress.step == "unpacking"
    assert len(host.calls["BuildImage"]) == 1
    with pytest.raises(errors.NotFound, match="forky image"):
        await client.run(image="no-such")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shape": common.Shape(memory_mib=64)}, "at least 128 MiB"),
        ({"shape": common.Shape(memory_mib=99_999)}, "does not fit on this host"),
        ({"shape": common.Shape(cpus=65)}, "1 to 64 CPUs"),
        ({"shape": common.Shape(disk_mib=100)}, "--disk 180M"),
        ({"shape": common.Shape(disk_mib=(16 << 20) + 1)}, "16 TiB"),
        ({"name": "Web!"}, "can't be a machine name"),
        ({"name": "m-0123456789ab"}, "can't be a machine name"),
    ],
)
async def test_what_can_never_run_is_refused(client: Client, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=words):
        await client.run(**fields)
    assert await client.machines() == {}


async def test_failed_run_leaves_nothing(client: Client, host: FakeHost) -> None:
    await client.run("first")
    host.fail("ForkSnapshot", errors.ResourceExhausted("no memory left: remove machines"))
    with pytest.raises(errors.ResourceExhausted, match="no memory left"):
        await client.run("web")
    assert set(await client.machines()) == {"first"}
    assert (await client.run("web")).state == RUNNING


async def test_run_that_is_left_is_undone(client: Client, host: FakeHost) -> None:
    await client.run("first")
    stall = host.stall("ForkSnapshot")
    call = asyncio.create_task(client.run("web"))
    await stall.reached.wait()
    assert (await client.machines())["web"].state == common.MACHINE_STATE_CREATING
    call.cancel()

    async def is_gone() -> bool:
        return set(await client.machines()) == {"first"}

    await eventually(is_gone)
    assert len(host.machines) == 1
    assert "run.failed" in await client.events()


async def test_run_that_is_left_between_two_messages_is_undone(
    settings: Settings, client: Client, host: FakeHost
) -> None:
    """gRPC's own streams notice by themselves only who leaves while they wait for a message."""
    await client.run("first")
    stall = host.stall("ForkSnapshot")
    async with Forky(settings.home, start=False) as forky:
        call = forky.controller.RunMachine(pb.RunMachineRequest(name="web"), timeout=30)
        updates = aiter(call)
        assert (await anext(updates)).progress.step == "starting"
        await stall.reached.wait()
        await updates.aclose()

        async def is_gone() -> bool:
            return set(await client.machines()) == {"first"}

        await eventually(is_gone)


# -- fork --------------------------------------------------------------------------------------------------------------


async def test_fork(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    result = await client.fork("web", 3)
    assert [c.machine.name for c in result.children] == ["web-1", "web-2", "web-3"]
    assert result.parent == web.id
    assert result.pause_ms == 12.5
    every = await client.machines()
    assert {m.snapshot for m in every.values()} == {result.snapshot.id}
    assert {every[f"web-{n}"].parent for n in (1, 2, 3)} == {web.id}
    assert (await client.snapshots())[result.snapshot.id].parent == web.snapshot
    await client.machine("RemoveMachine", "web-2")
    again = await client.fork(web.id, 2)
    assert [c.machine.name for c in again.children] == ["web-2", "web-4"]


async def test_fork_paused_children_of_a_paused_machine(client: Client) -> None:
    await client.run("web")
    assert (await client.machine("PauseMachine", "web")).state == PAUSED
    result = await client.fork("web", 1, options=common.ForkOptions(paused=True))
    assert result.children[0].machine.state == PAUSED


async def test_forks_at_once_never_share_a_name(client: Client, host: FakeHost) -> None:
    await client.run("web")
    results = await asyncio.gather(*(client.fork("web", 7, name_prefix="kid") for _ in range(6)))
    names = [c.machine.name for r in results for c in r.children]
    assert len(set(names)) == 42
    assert set(names) == {f"kid-{n}" for n in range(1, 43)}


async def test_fork_of_a_snapshot(client: Client) -> None:
    web = await client.run("web")
    taken = await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="base"))
    assert (taken.tag, taken.kind) == ("base", common.SNAPSHOT_KIND_KEPT)
    result = await client.fork("base", 2)
    assert [c.machine.name for c in result.children] == ["base-1", "base-2"]
    assert result.parent == ""
    assert result.children[0].machine.parent == web.id
    with pytest.raises(errors.AlreadyExists, match="base"):
        await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="base"))


@pytest.mark.parametrize("count", [0, 1001, 4_000_000_000])
async def test_absurd_counts(client: Client, count: int) -> None:
    await client.run("web")
    with pytest.raises(errors.InvalidRequest, match="child"):
        await client.fork("web", count)


async def test_fork_sources_that_are_none(client: Client) -> None:
    with pytest.raises(errors.NotFound, match=r"«nobody».*forky ps"):
        await client.fork("nobody")
    await client.run("web")
    await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="web"))
    with pytest.raises(errors.InvalidRequest, match="by its id"):
        await client.fork("web")
    await client.call("StopMachine", pb.StopMachineRequest(machine="web", force=True))
    with pytest.raises(errors.NotPossibleNow, match="forky start web"):
        await client.fork((await client.machines())["web"].id)


async def test_fork_whose_children_fail_leaves_the_parent_on_its_new_ground(client: Client, host: FakeHost) -> None:
    await client.run("web")
    host.fail("children", errors.GuestUnresponsive("a child's agent did not answer"))
    with pytest.raises(errors.GuestUnresponsive, match="agent"):
        await client.fork("web", 5)
    every = await client.machines()
    assert set(every) == {"web"}
    assert every["web"].snapshot == host.machines[every["web"].id].snapshot
    assert every["web"].snapshot in await client.snapshots()
    assert (await client.fork("web", 2)).children[1].machine.name == "web-2"


async def test_busy_is_passed_on(client: Client, host: FakeHost) -> None:
    await client.run("web")
    host.fail("ForkMachine", errors.Busy("machine «web»", "forking"))
    with pytest.raises(errors.Busy, match="busy: forking"):
        await client.fork("web", 1)
    assert set(await client.machines()) == {"web"}


async def test_fork_that_is_left_is_undone_and_the_parent_goes_on(client: Client, host: FakeHost) -> None:
    await client.run("web")
    stall = host.stall("ForkMachine")
    call = asyncio.create_task(client.fork("web", 3))
    await stall.reached.wait()
    every = await client.machines()
    assert every["web"].operation == "forking"
    assert every["web-1"].state == common.MACHINE_STATE_CREATING
    call.cancel()
    await asyncio.sleep(0.1)
    stall.go.set()

    async def is_undone() -> bool:
        return set(await client.machines()) == {"web"} and len(host.machines) == 1

    await eventually(is_undone)
    web = (await client.machines())["web"]
    assert web.state == RUNNING
    assert web.snapshot in host.snapshots
    del host.stalls["ForkMachine"]
    assert len((await client.fork("web", 3)).children) == 3


# -- collection and removal --------------------------------------------------------------------------------------------


async def test_fork_snapshots_go_when_nothing_stands_on_them(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    for _ in range(3):
        await client.fork("web", 1)
    for name in await client.machines():
        await client.machine("RemoveMachine", name)

    async def only_the_template() -> bool:
        return set(await client.snapshots()) == {web.snapshot} == set(host.snapshots)

    await eventually(only_the_template)


async def test_remove_snapshot_names_who_stands_on_it(client: Client, host: FakeHost) -> None:
    await client.run("web")
    taken = await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="base"))
    with pytest.raises(errors.NotPossibleNow, match=r"base.*machine web"):
        await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="base"))
    await client.machine("RemoveMachine", "web")
    await asyncio.sleep(0.3)
    assert taken.id in await client.snapshots()  # kept: nobody removes it but its owner
    await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="base"))
    assert taken.id not in host.snapshots


async def test_remove_image(client: Client, host: FakeHost) -> None:
    await client.run("web")
    with pytest.raises(errors.NotPossibleNow, match=r"debian-12.*machine web"):
        await client.call("RemoveImage", pb.ImageRequest(image="debian-12"))
    await client.fork("web", 2)
    for name in await client.machines():
        await client.machine("RemoveMachine", name)
    await client.call("RemoveImage", pb.ImageRequest(image=IMAGE.id))
    assert host.images == {}
    assert host.snapshots == {}
    assert (await client.call("ListImages")).images == []


async def test_machine_life(client: Client, host: FakeHost) -> None:
    await client.run("web")
    assert (await client.machine("PauseMachine", "web")).state == PAUSED
    assert (await client.machine("ResumeMachine", "web")).state == RUNNING
    stopped = await client.call("StopMachine", pb.StopMachineRequest(machine="web"))
    assert (stopped.state, stopped.qemu_pid) == (STOPPED, 0)
    with pytest.raises(errors.NotPossibleNow, match="stopped"):
        await client.machine("PauseMachine", "web")
    assert (await client.machine("StartMachine", "web")).state == RUNNING
    await client.machine("RemoveMachine", "web")
    with pytest.raises(errors.NotFound, match="forky ps"):
        await client.machine("GetMachine", "web")
    kinds = await client.events()
    assert [k for k in kinds if k.startswith("machine.")] == [
        "machine.created",
        "machine.running",
        "machine.paused",
        "machine.running",
        "machine.stopped",
        "machine.running",
        "machine.removed",
    ]


async def test_removal_that_fails_gives_the_machine_back(client: Client, host: FakeHost) -> None:
    await client.run("web")
    host.fail("RemoveMachine", errors.Busy("machine «web»", "forking"))
    with pytest.raises(errors.Busy, match="forking"):
        await client.machine("RemoveMachine", "web")
    assert (await client.machines())["web"].state == RUNNING


async def test_machine_that_dies_is_seen_to_have_failed(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    host.change(web.id, state=FAILED, failure="its QEMU ended", qemu_pid=0)

    async def has_failed() -> bool:
        return (await client.machines())["web"].failure == "its QEMU ended"

    await eventually(has_failed)
    with pytest.raises(errors.NotPossibleNow, match="its QEMU ended"):
        await client.fork("web")
    await client.machine("RemoveMachine", "web")


# -- the agent ---------------------------------------------------------------------------------------------------------


async def test_exec_both_ways(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    call = client.agent.Exec(timeout=20)
    await call.write(agent_pb2.ExecRequest(start=agent_pb2.ExecStart(machine="web", argv=["cat"], stdin=True)))
    assert (await call.read()).started.pid == 7
    for word in (b"one", b"two"):
        await call.write(agent_pb2.ExecRequest(stdin=word))
        assert (await call.read()).stdout == word
    await call.done_writing()
    assert (await call.read()).exit.code == 3
    assert host.calls["Exec"][0].start.machine == web.id


async def test_exec_that_is_left_ends_on_the_host(client: Client, host: FakeHost) -> None:
    await client.run("web")
    call = client.agent.Exec(timeout=20)
    await call.write(agent_pb2.ExecRequest(start=agent_pb2.ExecStart(machine="web", argv=["cat"], stdin=True)))
    await call.read()
    assert not host.exec_ended.is_set()
    call.cancel()
    async with asyncio.timeout(30):
        await host.exec_ended.wait()


async def test_exec_errors(client: Client, host: FakeHost) -> None:
    await client.run("web")
    start = agent_pb2.ExecRequest(start=agent_pb2.ExecStart(machine="nobody", argv=["true"]))
    with pytest.raises(errors.NotFound, match="nobody"), rpc_errors():
        _ = [r async for r in client.agent.Exec(iter([start]), timeout=20)]
    start.start.machine = "web"
    host.fail("exec", errors.GuestUnresponsive("the agent of «web» does not answer"))
    with pytest.raises(errors.GuestUnresponsive, match="does not answer"), rpc_errors():
        _ = [r async for r in client.agent.Exec(iter([start]), timeout=20)]
    with pytest.raises(errors.InvalidRequest, match="begins with"), rpc_errors():
        _ = [r async for r in client.agent.Exec(iter([agent_pb2.ExecRequest(stdin=b"x")]), timeout=20)]


async def test_download_waits_for_a_slow_reader(client: Client, host: FakeHost) -> None:
    await client.run("web")
    call = client.agent.Download(agent_pb2.DownloadRequest(machine="web", path="/x"), timeout=60)
    chunks = aiter(call)
    await anext(chunks)
    await asyncio.sleep(0.5)
    # 125 MiB are on offer; only what fits the windows and buffers on the way may have been taken.
    assert host.chunks_taken < 1000
    size = 65536
    async for chunk in chunks:
        size += len(chunk.data)
    assert size == 2000 * 65536


async def test_upload_stat_and_console(client: Client) -> None:
    web = await client.run("web")

    async def requests() -> AsyncIterator[agent_pb2.UploadRequest]:
        yield agent_pb2.UploadRequest(start=agent_pb2.UploadStart(machine="web", directory="/tmp"))
        for _ in range(10):
            yield agent_pb2.UploadRequest(data=bytes(1000))

    assert (await client.agent.Upload(requests(), timeout=20)).bytes == 10_000
    stat = await client.agent.StatPath(agent_pb2.StatPathRequest(machine="web", path="/"), timeout=20)
    assert stat.size_bytes == len(web.id)
    chunks = [c.data async for c in client.stub.ReadConsole(pb.ReadConsoleRequest(machine="web"), timeout=20)]
    assert b"".join(chunks) == b"console of " + web.id.encode()


async def test_status_and_doctor(client: Client, host: FakeHost) -> None:
    await client.run("web")
    status = await client.call("GetStatus")
    assert (status.hostd.pid, status.machines, status.snapshots, status.hostd_error) == (4711, 1, 1, "")
    names = {c.name: c.verdict for c in (await client.call("Doctor")).checks}
    assert set(names) == {"database", "disk space", "QEMU"}
    assert names["database"] == common.Check.VERDICT_OK
    await host.stop()

    async def is_told() -> bool:
        return "forky up" in (await client.call("GetStatus")).hostd_error

    await eventually(is_told)
    checks = {c.name: c for c in (await client.call("Doctor")).checks}
    assert checks["hostd"].verdict == common.Check.VERDICT_FAILED
    assert "forky up" in checks["hostd"].remedy
