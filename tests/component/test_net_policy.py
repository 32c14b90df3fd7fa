"""What reaches a machine and what a machine reaches: real packets through slots, under every policy."""

import socket
import time
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from forkypig.model.network import Egress, NetworkMode, NetworkPolicy, TcpMode
from forkypig.net import links
from forkypig.net.excepted import excepted
from forkypig.net.fabric import Fabric
from forkypig.net.netlink import NetlinkSocket
from forkypig.net.slot import Slot
from tests.component.net_rig import (
    HOST,
    METADATA,
    OUTSIDE,
    World,
    ask,
    connect,
    eventually,
    ip,
    needs_root,
    new_socket,
    ping,
    refused,
    talk,
    unheard,
    within,
)

pytestmark = needs_root


def _networks(*texts: str) -> Egress:
    return Egress(tuple(IPv4Network(text) for text in texts))


async def test_the_default(world: World, fabric: Fabric) -> None:
    one, other = await fabric.take(), await fabric.take()
    guest, neighbour = world.guest(one), world.guest(other)
    world.echo(world.outside, 80)
    world.echo(guest, 80)
    world.echo(neighbour, 80)
    # out, by the host's address; nobody outside knows the way to the slots
    assert ask(guest, OUTSIDE, 80) == HOST
    assert ping(guest, OUTSIDE)
    # from the host and from another machine, each seen as what it is
    assert ask(world.host, str(one.address), 80) == str(fabric.gateway)
    assert ask(neighbour, str(one.address), 80) == str(other.address)
    assert ping(world.host, str(one.address))
    # itself, by the address that others use
    assert ask(guest, str(one.address), 80) == "10.0.2.2"
    # UDP both ways
    for name, address in ((guest, OUTSIDE), (world.host, str(one.address))):
        with new_socket(name, socket.SOCK_DGRAM) as asking:
            asking.sendto(b"hi", (address, 80))
            assert asking.recv(100).startswith(b"hi ")
    # not from outside, even by someone who sets a route through the host
    ip("route", "add", "10.112.0.0/24", "via", HOST, inside=world.outside)
    with pytest.raises(TimeoutError):
        connect(world.outside, str(one.address), 80, timeout_s=0.5)


async def test_what_is_always_closed(world: World, fabric: Fabric) -> None:
    slot = await fabric.take()
    guest = world.guest(slot)
    world.echo(world.outside, 80)
    world.echo(world.host, 22)
    assert ask(world.host, METADATA, 80) == HOST  # it is there
    assert ask(world.host, HOST, 22) == HOST
    for egress in (Egress(), _networks("0.0.0.0/0"), _networks("0.0.0.0/1", "128.0.0.0/1")):
        await slot.apply(NetworkPolicy(egress=egress))
        assert refused(guest, METADATA, 80)
        for address in (HOST, str(fabric.gateway), "10.0.2.2", "10.0.2.3"):
            assert refused(guest, address, 22), address
        assert ask(guest, OUTSIDE, 80) == HOST
    assert ping(guest, HOST)
    assert ping(guest, "10.0.2.2")
    with new_socket(guest, socket.SOCK_DGRAM) as asking:
        for number in range(15):  # every one is answered, so that no program hangs (the host itself answers fewer)
            asking.connect((METADATA if number else HOST, 4000))
            asking.send(b"x")
            with pytest.raises(OSError, match="No route to host"):
                asking.recv(10)


async def test_what_is_named_exactly_is_open(world: World, fabric: Fabric) -> None:
    slot, other = await fabric.take(), await fabric.take()
    guest, neighbour = world.guest(slot), world.guest(other)
    world.echo(world.outside, 80)
    world.echo(world.host, 22)
    named = NetworkPolicy(egress=_networks(f"{METADATA}/32", f"{HOST}/32"))
    await slot.apply(named)
    assert ask(guest, METADATA, 80) == HOST
    assert ask(guest, HOST, 22) == str(slot.address)
    assert refused(guest, OUTSIDE, 80)
    assert refused(guest, str(fabric.gateway), 22)
    assert refused(neighbour, HOST, 22)
    await slot.apply(NetworkPolicy())
    assert refused(guest, METADATA, 80)
    assert refused(guest, HOST, 22)
    # nor does who gets the address next inherit it
    await slot.apply(named)
    await fabric.release(slot)
    assert fabric.room() == 252
    assert excepted(fabric.config.table) == {}


async def test_modes_and_egress(world: World, fabric: Fabric) -> None:
    slot, other = await fabric.take(), await fabric.take()
    guest, neighbour = world.guest(slot), world.guest(other)
    world.echo(world.outside, 80)
    world.echo(guest, 80)
    world.echo(neighbour, 80)
    own, next_door = str(slot.address), str(other.address)

    await slot.apply(NetworkPolicy(mode=NetworkMode.ISOLATED))
    assert refused(guest, OUTSIDE, 80)
    assert unheard(guest, OUTSIDE)
    assert ask(guest, next_door, 80) == own
    assert ask(neighbour, own, 80) == next_door
    assert ask(world.host, own, 80) == str(fabric.gateway)
    assert ask(guest, own, 80) == "10.0.2.2"

    await slot.apply(NetworkPolicy(egress=Egress(())))
    assert refused(guest, OUTSIDE, 80)
    assert refused(guest, next_door, 80)
    assert ask(neighbour, own, 80) == next_door  # answers go out
    assert ask(world.host, own, 80) == str(fabric.gateway)

    await slot.apply(NetworkPolicy(egress=_networks("198.18.0.0/24", "198.18.0.0/16")))
    assert ask(guest, OUTSIDE, 80) == HOST
    assert refused(guest, next_door, 80)

    await slot.apply(NetworkPolicy(egress=_networks(f"{next_door}/32")))
    assert refused(guest, OUTSIDE, 80)
    assert ask(guest, next_door, 80) == own

    await slot.apply(NetworkPolicy(mode=NetworkMode.NONE))
    for name, address in ((guest, OUTSIDE), (guest, next_door), (guest, "10.0.2.2"), (neighbour, own), (guest, own)):
        with pytest.raises(OSError, match=r"timed out|No route"):
            connect(name, address, 80, timeout_s=0.15)
    assert unheard(world.host, own)
    assert unheard(guest, "10.0.2.2")
    ip("neigh", "flush", "dev", "fk-test")
    ip("neigh", "flush", "dev", "eth0", inside=guest)
    assert unheard(world.host, own)
    assert unheard(guest, "10.0.2.2")
    assert "lladdr" not in ip("neigh", "show", own)  # not even asked for its MAC
    assert "lladdr" not in ip("neigh", "show", "10.0.2.2", inside=guest)

    await slot.apply(NetworkPolicy())
    assert ask(guest, OUTSIDE, 80) == HOST


async def test_a_changed_policy_cuts_open_connections(world: World, fabric: Fabric) -> None:
    slot = await fabric.take()
    guest = world.guest(slot)
    world.echo(world.outside, 80)
    world.echo(guest, 80)
    outward, inward = connect(guest, OUTSIDE, 80), connect(world.host, str(slot.address), 80)
    with outward, inward:
        assert talk(outward) == HOST
        assert talk(inward) == str(fabric.gateway)
        await slot.apply(NetworkPolicy(egress=_networks("198.18.0.0/16"), bandwidth_bytes_s=10**6))
        assert talk(outward) == HOST  # still allowed: goes on
        await slot.apply(NetworkPolicy(egress=Egress(())))
        with pytest.raises(ConnectionResetError):
            talk(outward)
        assert talk(inward) == str(fabric.gateway)


@pytest.mark.parametrize("mode", [TcpMode.RESET, TcpMode.SILENT])
async def test_connections_that_a_child_inherits(world: World, fabric: Fabric, mode: TcpMode) -> None:
    """The child has the parent's TCP stack, with its open connections: here the same guest behind another slot."""
    parent, child = await fabric.take(), await fabric.take()
    guest = world.guest(parent)
    world.echo(world.outside, 80)
    server = world.echo(guest, 80)
    outward, inward = connect(guest, OUTSIDE, 80), connect(world.host, str(parent.address), 80)
    with outward, inward:
        assert talk(outward) == HOST
        assert talk(inward) == str(fabric.gateway)
        await child.apply(NetworkPolicy(tcp=mode))
        _move(parent, child, guest)
        before = _segments(world.outside)
        outward.settimeout(20.0 if mode is TcpMode.RESET else 0.7)
        if mode is TcpMode.RESET:
            with pytest.raises(ConnectionResetError):
                talk(outward)
        else:
            with pytest.raises(TimeoutError):
                talk(outward)
        assert _segments(world.outside) == before  # nothing of it gets to the other side, in either mode
        # what begins in the child is not held back
        assert ask(guest, OUTSIDE, 80) == HOST
        assert ask(world.host, str(child.address), 80) == str(fabric.gateway)
    assert server


def _move(parent: Slot, child: Slot, guest: str) -> None:
    """Plugs the guest's cable into another slot, and waits until the guest's end has noticed."""
    ip("link", "set", "g0", "netns", child.name, inside=parent.name)
    ip("link", "set", "g0", "master", "br0", "up", inside=child.name)
    child.switch("g0")
    assert eventually(lambda: "state UP" in ip("link", "show", "eth0", inside=guest))


def _segments(name: str) -> int:
    """How many TCP segments came in there."""
    lines = within(name, lambda: Path("/proc/thread-self/net/snmp").read_text()).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("InSegs")])


async def test_bandwidth(world: World, fabric: Fabric) -> None:
    slot = await fabric.take()
    guest = world.guest(slot)
    world.echo(world.outside, 80)
    await slot.apply(NetworkPolicy(bandwidth_bytes_s=300_000))
    assert _limits(slot) == ([300_000], [300_000])
    assert ask(guest, OUTSIDE, 80) == HOST
    await slot.apply(NetworkPolicy(bandwidth_bytes_s=6_000_000_000))
    assert _limits(slot) == ([6_000_000_000], [6_000_000_000])
    assert ask(guest, OUTSIDE, 80) == HOST
    await slot.apply(NetworkPolicy())
    assert _limits(slot) == ([], [])
    await slot.apply(NetworkPolicy())  # nothing to remove is no error
    assert ask(guest, OUTSIDE, 80) == HOST


def _limits(slot: Slot) -> tuple[list[int], list[int]]:
    def read() -> list[int]:
        with NetlinkSocket() as netlink:
            return list(links.rate_limits(netlink).values())

    return read(), within(slot.name, read)


async def test_a_limit_is_kept(world: World, fabric: Fabric) -> None:
    """2 MB/s for 300 kB: at least the part that is not the first burst takes its time. (An upper bound is no test.)"""
    slot = await fabric.take()
    guest = world.guest(slot)
    await slot.apply(NetworkPolicy(bandwidth_bytes_s=2_000_000))
    for sender, receiver, address in ((guest, world.outside, OUTSIDE), (world.host, guest, str(slot.address))):
        listening = new_socket(receiver)
        listening.bind(("0.0.0.0", 81))
        listening.listen()
        with listening, connect(sender, address, 81) as sending, listening.accept()[0] as receiving:
            began = time.monotonic()
            left = 300_000
            sending.sendall(bytes(left))
            while left:
                left -= len(receiving.recv(left))
            assert time.monotonic() - began > 0.1


async def test_ipv6_is_dropped_and_spoofing_too(world: World, fabric: Fabric) -> None:
    slot = await fabric.take()
    guest = world.guest(slot)
    world.echo(world.outside, 80)
    ip("addr", "add", "10.0.2.99/24", "dev", "eth0", inside=guest)
    with new_socket(guest, timeout_s=0.5) as spoofing:
        spoofing.bind(("10.0.2.99", 0))
        with pytest.raises(TimeoutError):
            spoofing.connect((OUTSIDE, 80))
    assert "inet6" not in ip("addr", inside=slot.name)
    assert "inet6" not in ip("addr", "show", "dev", "fk-test")
