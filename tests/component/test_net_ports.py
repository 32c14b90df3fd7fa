"""Published ports: from the host itself, by loopback, from outside and from machines; taken ports; UDP."""

import socket

import pytest

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model.network import NetworkMode, NetworkPolicy, PortForward
from forkypig.net import sysctl
from forkypig.net.fabric import Fabric
from tests.component.net_rig import (
    HOST,
    OUTSIDE,
    World,
    ask,
    connect,
    needs_root,
    new_socket,
    nft,
    refused,
    talk,
)

pytestmark = needs_root


@pytest.mark.parametrize("bridge_filter", ["0", "1"])
async def test_from_everywhere(world: World, fabric: Fabric, bridge_filter: str) -> None:
    """Also where br_netfilter shows the host's rules what is bridged: its setting is the host's, as others left it."""
    if sysctl.read("bridge/bridge-nf-call-iptables") is not None:
        sysctl.write("bridge/bridge-nf-call-iptables", bridge_filter)
    slot, other = await fabric.take(), await fabric.take()
    guest, neighbour = world.guest(slot), world.guest(other)
    world.echo(guest, 80)
    forward = PortForward(8080, 80)
    await fabric.publish(slot, forward)
    await fabric.publish(slot, forward)  # said again by a hostd that is not sure
    gateway = str(fabric.gateway)
    assert ask(world.outside, HOST, 8080) == OUTSIDE  # who it really is
    assert ask(world.host, "127.0.0.1", 8080) == gateway
    assert ask(world.host, HOST, 8080) == gateway
    assert ask(neighbour, HOST, 8080) == gateway
    assert ask(guest, HOST, 8080) == gateway
    assert fabric.published(slot) == [forward]
    # an isolated machine's port is for this host and its machines
    await slot.apply(NetworkPolicy(mode=NetworkMode.ISOLATED))
    assert refused(world.outside, HOST, 8080)
    assert ask(world.host, "127.0.0.1", 8080) == gateway
    assert ask(world.host, HOST, 8080) == gateway
    await slot.apply(NetworkPolicy())

    with connect(world.outside, HOST, 8080) as open_one:
        assert talk(open_one) == OUTSIDE
        await fabric.unpublish(slot, forward)
        open_one.settimeout(1)
        with pytest.raises(OSError, match=r"reset|timed out"):
            talk(open_one)
    for name, address in ((world.outside, HOST), (world.host, "127.0.0.1")):
        assert refused(name, address, 8080)
    await fabric.unpublish(slot, forward)  # nothing to take back is no error
    with new_socket(world.host) as free:
        free.bind(("0.0.0.0", 8080))


async def test_one_address_of_the_host(world: World, fabric: Fabric) -> None:
    slot, other = await fabric.take(), await fabric.take()
    world.echo(world.guest(slot), 80)
    world.echo(world.guest(other), 80)
    await fabric.publish(slot, PortForward(8080, 80, host_address="127.0.0.1"))
    await fabric.publish(other, PortForward(8080, 80, host_address=HOST))
    assert ask(world.host, "127.0.0.1", 8080) == str(fabric.gateway)
    assert ask(world.outside, HOST, 8080) == OUTSIDE
    await fabric.unpublish(other, PortForward(8080, 80, host_address=HOST))
    assert refused(world.outside, HOST, 8080)
    assert ask(world.host, "127.0.0.1", 8080) == str(fabric.gateway)


async def test_ports_that_can_not_be_had(world: World, fabric: Fabric) -> None:
    slot, other = await fabric.take(), await fabric.take()
    world.echo(world.host, 22)
    await fabric.publish(slot, PortForward(8080, 80))
    for forward, complaint in (
        (PortForward(22, 22), "port 22/tcp on this host is in use by another program"),
        (PortForward(22, 22, "udp"), "port 22/udp on this host is in use"),
        (PortForward(22, 22, host_address="127.0.0.1"), "port 22/tcp of 127.0.0.1 on this host is in use"),
        (PortForward(8080, 81), "port 8080/tcp on this host is published already, for a machine"),
        (PortForward(80, 80, host_address="198.18.0.77"), "198.18.0.77 is no address of this host"),
        (PortForward(80, 80, host_address="localhost"), "no IPv4 address"),
        (PortForward(0, 80), "0 is no port"),
        (PortForward(80, 65536), "65536 is no port"),
        (PortForward(80, 80, "sctp"), "tcp or udp"),
    ):
        with pytest.raises((InvalidRequest, NotPossibleNow), match=complaint):
            await fabric.publish(other, forward)
    assert fabric.published(other) == []
    # while it is published nobody else gets it, whatever they set
    with new_socket(world.host) as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            rival.bind(("0.0.0.0", 8080))


async def test_a_sender_that_never_stops(world: World, fabric: Fabric) -> None:
    """NAT decides once per connection, and over UDP somebody who goes on sending is one: publishing forgets it."""
    slot, other = await fabric.take(), await fabric.take()
    world.echo(world.guest(slot), 80)
    world.echo(world.guest(other), 81)
    forward, moved = PortForward(5000, 80, "udp"), PortForward(5000, 81, "udp")

    def answered(sender: socket.socket, timeout_s: float = 20.0) -> bool:
        sender.settimeout(timeout_s)
        try:
            sender.send(b"x")
            return sender.recv(100) == b"x " + OUTSIDE.encode()
        except OSError:
            return False

    with new_socket(world.outside, socket.SOCK_DGRAM) as sender:
        sender.connect((HOST, 5000))
        assert not answered(sender, 0.5)
        await fabric.publish(slot, forward)
        assert answered(sender)
        await fabric.unpublish(slot, forward)
        assert not answered(sender, 0.5)
        await fabric.publish(other, moved)
        assert answered(sender)
        await fabric.release(other)
        assert not answered(sender, 0.5)


async def test_the_next_hostd(world: World, fabric: Fabric) -> None:
    slot = await fabric.take()
    world.echo(world.guest(slot), 80)
    await fabric.publish(slot, PortForward(8080, 80))
    await fabric.publish(slot, PortForward(8081, 80, host_address="127.0.0.1"))
    with connect(world.outside, HOST, 8080) as open_one:
        assert talk(open_one) == OUTSIDE
        await fabric.close(remove=False)
        assert talk(open_one) == OUTSIDE
        assert ask(world.outside, HOST, 8080) == OUTSIDE
        after = Fabric(world.config(), ready=0)
        await after.open()
        adopted = await after.adopt(slot.name)
        assert set(after.published(adopted)) == {PortForward(8080, 80), PortForward(8081, 80, host_address="127.0.0.1")}
        await after.publish(adopted, PortForward(8080, 80))
        assert talk(open_one) == OUTSIDE
        await after.release(adopted)
        assert "8080" not in nft("list", "ruleset")
        await after.close(remove=False)
