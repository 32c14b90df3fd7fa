"""Tags, histories, restore, hibernation and runs from snapshots, through the controller's API against a fake host."""

import pytest

from forkypig import errors
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire.status import rpc_errors
from tests.component.controller_rig import Client, eventually
from tests.component.fake_host import HIBERNATED, RUNNING, STOPPED, FakeHost


async def keep(client: Client, tag: str = "", message: str = "") -> common.Snapshot:
    return await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag=tag, message=message))


async def tag(client: Client, snapshot: str, name: str, *, force: bool = False) -> common.Snapshot:
    return await client.call("TagSnapshot", pb.TagSnapshotRequest(snapshot=snapshot, tag=name, force=force))


async def history(client: Client, source: str) -> list[str]:
    answer = await client.call("GetHistory", pb.HistoryRequest(source=source))
    return [each.tag or common.SnapshotKind.Name(each.kind) for each in answer.snapshots]


async def restore(client: Client, machine: str, snapshot: str, keep_tag: str = "") -> common.Machine:
    request = pb.RestoreMachineRequest(machine=machine, snapshot=snapshot, keep_tag=keep_tag)
    return await client.call("RestoreMachine", request)


async def hibernate(client: Client, machine: str) -> list[pb.MachineUpdate]:
    with rpc_errors():
        return [u async for u in client.stub.HibernateMachine(pb.MachineRequest(machine=machine), timeout=30)]


async def test_a_history_is_what_a_thing_stands_on(client: Client, host: FakeHost) -> None:
    await client.run("web")
    await keep(client, "one", "the first")
    await keep(client, "two")
    assert await history(client, "web") == ["two", "one", "SNAPSHOT_KIND_TEMPLATE"]
    assert await history(client, "one") == ["one", "SNAPSHOT_KIND_TEMPLATE"]
    with pytest.raises(errors.NotFound):
        await history(client, "nobody")
    found = await client.call("GetSnapshot", pb.SnapshotRequest(snapshot="one"))
    assert found.message == "the first"
    with pytest.raises(errors.InvalidRequest, match="message"):
        await keep(client, "three", "x" * 5000)


async def test_a_snapshot_is_found_by_the_beginning_of_its_id(client: Client, host: FakeHost) -> None:
    await client.run("web")
    made = [await keep(client) for _ in range(40)]
    first = made[0].id
    unique = next(n for n in range(3, 15) if sum(each.id[:n] == first[:n] for each in made) == 1)
    for text in (first, first[:unique], first[: max(unique, 6)][2:]):
        assert (await client.call("GetSnapshot", pb.SnapshotRequest(snapshot=text))).id == first
    # Forty ids begin with sixteen digits: two of them alike.
    digits = [each.id[2] for each in made]
    common_digit = next(d for d in digits if digits.count(d) > 1)
    with pytest.raises(errors.InvalidRequest, match=r"begins the ids of \d+ snapshots: s-"):
        await client.call("GetSnapshot", pb.SnapshotRequest(snapshot=f"s-{common_digit}"))
    with pytest.raises(errors.NotFound):
        await client.call("GetSnapshot", pb.SnapshotRequest(snapshot="good"))


async def test_tags_are_given_moved_and_taken_away(client: Client, host: FakeHost) -> None:
    await client.run("web")
    one, two = await keep(client, "one"), await keep(client)
    with pytest.raises(errors.AlreadyExists, match="one"):
        await tag(client, two.id, "one")
    with pytest.raises(errors.NotPossibleNow, match="--force"):
        await tag(client, "one", "uno")
    assert (await tag(client, two.id, "one", force=True)).id == two.id
    assert (await client.snapshots())[one.id].tag == ""
    assert host.snapshots[one.id].tag == ""
    assert host.snapshots[two.id].tag == "one"
    assert (await tag(client, "one", "one")).id == two.id  # it is so already
    untagged = await client.call("UntagSnapshot", pb.UntagSnapshotRequest(tag="one"))
    assert (untagged.id, untagged.tag, untagged.kind) == (two.id, "", common.SNAPSHOT_KIND_KEPT)
    with pytest.raises(errors.NotFound):
        await client.call("UntagSnapshot", pb.UntagSnapshotRequest(tag="one"))
    with pytest.raises(errors.NotFound, match="it has none"):
        await client.call("UntagSnapshot", pb.UntagSnapshotRequest(tag=two.id))
    template = next(s.id for s in (await client.snapshots()).values() if s.kind == common.SNAPSHOT_KIND_TEMPLATE)
    for call in (
        tag(client, template, "mine"),
        client.call("UntagSnapshot", pb.UntagSnapshotRequest(tag=template)),
    ):
        with pytest.raises(errors.NotPossibleNow, match="template"):
            await call


async def test_a_tagged_snapshot_of_a_fork_stays(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    made = (await client.fork("web")).snapshot.id
    await tag(client, made, "point")
    for machine in ("web", "web-1"):
        await client.machine("RemoveMachine", machine)
    other = await client.run("other")
    await client.fork("other")
    for machine in ("other", "other-1"):
        await client.machine("RemoveMachine", machine)
    kinds = (common.SNAPSHOT_KIND_FORK,)
    await eventually(lambda: _none_of(client, kinds))
    assert (await client.snapshots())[made].kind == common.SNAPSHOT_KIND_KEPT
    assert web.id != other.id


async def _none_of(client: Client, kinds: tuple[int, ...]) -> bool:
    return not any(s.kind in kinds for s in (await client.snapshots()).values())


async def test_restore_keeps_who_it_is_and_says_what_does_not_fit(client: Client, host: FakeHost) -> None:
    web = await client.run("web")
    one = await keep(client, "one")
    await keep(client, "two")
    went_back = await restore(client, "web", "one", keep_tag="before")
    assert (went_back.id, went_back.name, went_back.snapshot) == (web.id, "web", one.id)
    assert await history(client, "web") == ["one", "SNAPSHOT_KIND_TEMPLATE"]
    assert await history(client, "before") == ["before", "two", "one", "SNAPSHOT_KIND_TEMPLATE"]
    with pytest.raises(errors.AlreadyExists):
        await restore(client, "web", "one", keep_tag="before")
    with pytest.raises(errors.NotFound):
        await restore(client, "web", "nothing", keep_tag="unneeded")
    assert "unneeded" not in {s.tag for s in (await client.snapshots()).values()}
    await client.run("big", shape=common.Shape(memory_mib=1024))
    with pytest.raises(errors.NotPossibleNow, match=r"another shape .*1024 MiB.* forky run --from one"):
        await restore(client, "big", "one")
    assert [call.snapshot for call in host.calls["RestoreMachine"]] == [one.id]


async def test_a_restore_that_fails_on_the_host_leaves_the_records_as_they_were(client: Client, host: FakeHost) -> None:
    await client.run("web")
    await keep(client, "one")
    await keep(client, "two")
    host.fail("RestoreMachine", errors.NotPossibleNow("snapshot was made by another build of QEMU"))
    with pytest.raises(errors.NotPossibleNow, match="another build"):
        await restore(client, "web", "one")
    assert await history(client, "web") == ["two", "one", "SNAPSHOT_KIND_TEMPLATE"]
    assert {"one", "two"} <= {s.tag for s in (await client.snapshots()).values()}


async def test_a_snapshot_can_not_go_while_a_machine_goes_back_to_it(client: Client, host: FakeHost) -> None:
    import asyncio

    await client.run("web")
    one = await keep(client, "one")
    await client.run("other")
    stall = host.stall("RestoreMachine")
    # Of a machine that does not stand on it.
    going = asyncio.ensure_future(restore(client, "other", "one"))
    await stall.reached.wait()
    await client.machine("RemoveMachine", "web")
    with pytest.raises(errors.Busy):
        await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot="one"))
    stall.go.set()
    assert (await going).snapshot == one.id


async def test_hibernation_and_waking(client: Client, host: FakeHost) -> None:
    await client.run("web")
    updates = await hibernate(client, "web")
    assert updates[0].progress.step == "packing"
    asleep = updates[-1].machine
    assert (asleep.state, asleep.qemu_pid) == (HIBERNATED, 0)
    assert (await client.snapshots())[asleep.snapshot].kind == common.SNAPSHOT_KIND_HIBERNATION
    assert (await hibernate(client, "web"))[-1].machine.snapshot == asleep.snapshot
    for method in ("StartMachine", "PauseMachine"):
        with pytest.raises(errors.NotPossibleNow, match="forky wake web"):
            await client.machine(method, "web")
    with pytest.raises(errors.NotPossibleNow, match="machine web"):
        await client.call("RemoveSnapshot", pb.SnapshotRequest(snapshot=asleep.snapshot))
    awake = await client.machine("WakeMachine", "web")
    assert (awake.state, awake.snapshot) == (RUNNING, asleep.snapshot)
    with pytest.raises(errors.NotPossibleNow, match="not hibernated"):
        await client.machine("WakeMachine", "web")
    host.change(awake.id, state=STOPPED)
    await eventually(lambda: _is(client, STOPPED))
    with pytest.raises(errors.NotPossibleNow, match="forky start web"):
        await hibernate(client, "web")


async def _is(client: Client, state: int) -> bool:
    return (await client.machines())["web"].state == state


async def test_the_snapshot_of_a_hibernation_goes_with_its_machine(client: Client, host: FakeHost) -> None:
    await client.run("web")
    await hibernate(client, "web")
    await client.machine("RemoveMachine", "web")
    await eventually(lambda: _none_of(client, (common.SNAPSHOT_KIND_HIBERNATION,)))


async def test_a_run_from_a_snapshot(client: Client, host: FakeHost) -> None:
    ports = [common.PortForward(host_port=8080, guest_port=80)]
    config = common.ConfigChange(publish=ports, bandwidth_bytes_s=5000, restart=common.RESTART_POLICY_ALWAYS)
    web = await client.run("web", config=config)
    assert web.config.restart == common.RESTART_POLICY_ALWAYS
    one = await keep(client, "one")
    again = await client.run("again", snapshot="one")
    assert (again.name, again.snapshot, again.parent, again.image_name) == ("again", one.id, web.id, "debian-12")
    assert (again.config.bandwidth_bytes_s, list(again.config.ports)) == (5000, [])
    assert again.config.restart == common.RESTART_POLICY_NO
    with pytest.raises(errors.InvalidRequest, match="leave out"):
        await client.run("big", snapshot="one", shape=common.Shape(memory_mib=1024))
    with pytest.raises(errors.AlreadyExists):
        await client.run("again", snapshot="one")
    with pytest.raises(errors.NotFound):
        await client.run("no", snapshot="nothing")
    host.fail("ForkSnapshot", errors.ResourceExhausted("no memory"))
    with pytest.raises(errors.ResourceExhausted):
        await client.run("full", snapshot="one")
    assert set(await client.machines()) == {"web", "again"}
