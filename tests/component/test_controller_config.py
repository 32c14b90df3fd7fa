"""A machine's config on its way from the client to the host, to children, and back after a restart."""

import pytest

from forkypig import errors
from forkypig.daemon.settings import Settings
from forkypig.model import ConfigChange, Egress, ForkOptions, Limits, NetworkMode, PortForward, TcpMode
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire.config import change_to_wire, config_from_wire, options_to_wire
from tests.component.controller_rig import Client, serving
from tests.component.fake_host import FakeHost

SECLUDED = ConfigChange(
    mode=NetworkMode.ISOLATED,
    egress=Egress.parse("10.0.0.0/8,192.0.2.1/32"),
    bandwidth_bytes_s=1_000_000,
    publish=(PortForward(8080, 80), PortForward(5353, 53, "udp", "127.0.0.1")),
    limits=Limits(cpus=0.5, io_mib_s=20),
)


async def update(client: Client, machine: str, change: ConfigChange) -> common.Machine:
    request = pb.UpdateMachineRequest(machine=machine, change=change_to_wire(change))
    return await client.call("UpdateMachine", request)  # type: ignore[no-any-return]


async def test_a_config_reaches_the_host_and_the_records(client: Client, host: FakeHost) -> None:
    made = await client.run("web", config=change_to_wire(SECLUDED))
    told = config_from_wire(host.calls["ForkSnapshot"][-1].children[0].config)
    assert told == config_from_wire(made.config) == config_from_wire((await client.machines())["web"].config)
    assert told.network.mode is NetworkMode.ISOLATED
    assert str(told.network.egress) == "10.0.0.0/8,192.0.2.1/32"
    assert told.network.bandwidth_bytes_s == 1_000_000
    assert told.ports == SECLUDED.publish
    assert told.limits == Limits(cpus=0.5, io_mib_s=20)


async def test_a_cold_boot_has_its_config_too(client: Client, host: FakeHost) -> None:
    await client.run("web", cold_boot=True, config=change_to_wire(SECLUDED))
    assert config_from_wire(host.calls["BootMachine"][0].config).limits.cpus == 0.5


async def test_children_inherit_all_but_the_ports(client: Client, host: FakeHost) -> None:
    await client.run("web", config=change_to_wire(SECLUDED))
    silent = change_to_wire(ConfigChange(tcp=TcpMode.SILENT, limits=Limits(cpus=0.25)))
    options = options_to_wire(ForkOptions(quiesce=True, forget=("TOKEN",)))
    made = await client.fork("web", 2, config=silent, options=options)
    asked = host.calls["ForkMachine"][0]
    assert (asked.options.quiesce, list(asked.options.forget)) == (True, ["TOKEN"])
    for child in made.children:
        config = config_from_wire(child.machine.config)
        assert (config.ports, config.network.mode, config.network.tcp) == ((), NetworkMode.ISOLATED, TcpMode.SILENT)
        assert config.limits == Limits(cpus=0.25, io_mib_s=20)


async def test_a_child_has_no_more_than_its_parent(client: Client, host: FakeHost) -> None:
    await client.run("web", config=change_to_wire(SECLUDED))
    with pytest.raises(errors.InvalidRequest, match="its parent has"):
        await client.fork("web", config=change_to_wire(ConfigChange(limits=Limits(cpus=2))))
    assert not host.calls["ForkMachine"]


async def test_a_machine_that_must_not_fork(client: Client, host: FakeHost) -> None:
    await client.run("vault", config=change_to_wire(ConfigChange(no_fork=True)))
    with pytest.raises(errors.NotPossibleNow, match="--no-fork"):
        await client.fork("vault")
    with pytest.raises(errors.NotPossibleNow, match="--no-fork"):
        await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="vault"))
    assert not host.calls["ForkMachine"]
    await update(client, "vault", ConfigChange(no_fork=False))
    assert (await client.fork("vault")).children


async def test_an_update_changes_what_it_names(client: Client, host: FakeHost) -> None:
    await client.run("web", config=change_to_wire(SECLUDED))
    change = ConfigChange(egress=Egress(()), bandwidth_bytes_s=0, unpublish=(PortForward(8080, 0),))
    config = config_from_wire((await update(client, "web", change)).config)
    assert config == config_from_wire((await client.machines())["web"].config)
    assert config.network.egress.denied
    assert config.network.bandwidth_bytes_s is None
    assert config.network.mode is NetworkMode.ISOLATED
    assert config.ports == (PortForward(5353, 53, "udp", "127.0.0.1"),)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (ConfigChange(unpublish=(PortForward(1, 1),)), "not published"),
        (ConfigChange(publish=(PortForward(1, 1), PortForward(1, 2))), "twice"),
        (ConfigChange(bandwidth_bytes_s=5), "too little"),
        (ConfigChange(limits=Limits(pids=2)), "too little"),
    ],
)
async def test_changes_that_can_not_be(client: Client, host: FakeHost, change: ConfigChange, says: str) -> None:
    await client.run("web")
    with pytest.raises(errors.InvalidRequest, match=says):
        await update(client, "web", change)
    assert not host.calls["ConfigureMachine"]


async def test_a_change_that_the_host_refuses_changes_nothing(client: Client, host: FakeHost) -> None:
    await client.run("web")
    host.failures["ConfigureMachine"].append(errors.InvalidRequest("port 80/tcp of this host is in use"))
    with pytest.raises(errors.InvalidRequest, match="in use"):
        await update(client, "web", ConfigChange(publish=(PortForward(80, 80),)))
    assert config_from_wire((await client.machines())["web"].config).ports == ()


async def test_a_config_outlives_a_restart(settings: Settings, host: FakeHost) -> None:
    async with serving(settings) as client:
        await client.run("web", config=change_to_wire(SECLUDED))
    async with serving(settings) as client:
        assert config_from_wire((await client.machines())["web"].config).ports == SECLUDED.publish


async def test_what_an_images_forks_forget(client: Client, host: FakeHost) -> None:
    await client.run("web")
    request = pb.UpdateImageRequest(image="debian-12", forget_files=["/etc/secret", "/root/.ssh"])
    assert list((await client.call("UpdateImage", request)).forget_files) == ["/etc/secret", "/root/.ssh"]
    shown = await client.call("GetImage", pb.ImageRequest(image="debian-12"))
    assert list(shown.forget_files) == ["/etc/secret", "/root/.ssh"]
    with pytest.raises(errors.NotFound):
        await client.call("UpdateImage", pb.UpdateImageRequest(image="nobody"))
