"""A slot's life: made, switched, adopted, damaged, mended, removed; clashes with the host; hundreds of them.

More than 500 lines: a test for each of these, on the helpers of this file."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from forkypig.errors import InternalError, InvalidRequest, NotFound, NotPossibleNow, ResourceExhausted
from forkypig.model.network import NetworkMode, NetworkPolicy
from forkypig.net import namespace, sysctl
from forkypig.net.doctor import missing
from forkypig.net.fabric import Fabric
from forkypig.net.slot import Slot
from forkypig.net.tap import open_tap
from tests.component.net_rig import (
    HOST,
    MAC,
    OUTSIDE,
    World,
    ask,
    configure_guest,
    connect,
    ip,
    needs_root,
    new_socket,
    nft,
    talk,
    within,
)

pytestmark = needs_root


@contextlib.asynccontextmanager
async def _fabric(world: World, ready: int = 0, **changes: object):
    made = Fabric(world.config(**changes), ready=ready)
    await made.open()
    try:
        yield made
    finally:
        await made.close(remove=True)


# -- a machine that moves ----------------------------------------------------------------------------------------------


class Pump:
    """What QEMU does: carries frames between the guest (a tap in its namespace) and one of the slot's taps."""

    def __init__(self, guest_fd: int, tap_fd: int) -> None:
        self._guest, self.tap = guest_fd, tap_fd
        self._ended = threading.Event()
        self._moving = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._moving:
                moved = self._carry(self._guest, self.tap) + self._carry(self.tap, self._guest)
            if not moved:
                time.sleep(0.0005)

    @staticmethod
    def _carry(source: int, target: int) -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while count < 64:
                os.write(target, os.read(source, 65536))
                count += 1
        return count

    def move(self, slot: Slot, tap: int, name: str, pause_s: float) -> None:
        """As a split does it: the switch first, then the old one stops, and the new one runs a while later."""
        slot.switch(name)
        with self._moving:
            while self._carry(self.tap, self._guest):  # it reads what came before the switch
                pass
            time.sleep(pause_s)
            self.tap = tap

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)


async def test_no_packet_is_lost_in_a_switch(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        first = await slot.open_tap("q-first")
        assert first.name == "q-first"
        slot.switch("q-first")
        guest = f"{world.tag}-moving"
        ip("netns", "add", guest)
        world.also(guest)
        inner = within(guest, lambda: open_tap("eth0"))
        configure_guest(guest)
        _patient(guest, "default", "via", "10.0.2.2")
        _patient(world.host, str(fabric.subnet), "dev", "fk-test")
        pump = Pump(inner.fd, first.fd)
        taps = [first]
        try:
            world.echo(world.outside, 80)
            world.echo(guest, 80)
            outward, inward = connect(guest, OUTSIDE, 80), connect(world.host, str(slot.address), 80)
            with outward, inward:
                moved = threading.Event()
                sending = [asyncio.to_thread(_stream, each, moved) for each in (outward, inward)]
                streams = [asyncio.ensure_future(each) for each in sending]
                for number in range(5):
                    await asyncio.sleep(0.05)
                    taps.append(await slot.open_tap(f"q-{number}"))
                    pump.move(slot, taps[-1].fd, taps[-1].name, pause_s=0.02)
                    assert slot.current_tap() == f"q-{number}"
                    os.close(taps[-2].fd)
                moved.set()
                assert [await stream for stream in streams] == [0, 0]
                assert "q-3" not in ip("link", inside=slot.name)
        finally:
            pump.close()
            os.close(taps[-1].fd)
            os.close(inner.fd)


def _patient(name: str, *route: str) -> None:
    """TCP sends again there after a minute, not after 200 ms: what is late, as its sender stood still, is not lost."""
    ip("route", "change", *route, "rto_min", "60s", inside=name)
    within(name, lambda: Path("/proc/sys/net/ipv4/tcp_early_retrans").write_text("0"))  # nor probes for a lost tail


def _stream(connection: socket.socket, ended: threading.Event) -> int:
    """A request loop; gives how many segments had to be sent again from this side."""
    before = _sent_again(connection)  # to connect
    while not ended.is_set():
        talk(connection, b"x" * 500)
    return _sent_again(connection) - before


def _sent_again(connection: socket.socket) -> int:
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", information, 100)[0])  # tcpi_total_retrans


async def test_what_was_not_read_before_the_stop_is_carried_over(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        old, new = await slot.open_tap("q-old"), await slot.open_tap("q-new")
        remainder = await slot.remainder(os.dup(old.fd), "q-new")
        try:
            slot.switch("q-old")
            fcntl.ioctl(old.fd, 0x400454D8, struct.pack("I", 12))  # TUNSETVNETHDRSZ: as a modern driver wants it
            with new_socket(slot.name, socket.SOCK_DGRAM) as speaking:
                for number in range(3):
                    speaking.sendto(b"datagram %d" % number, ("10.0.2.15", 5))
                slot.switch("q-new")
                speaking.sendto(b"datagram 3", ("10.0.2.15", 5))
            assert remainder.carry_over() == 4  # the three, and the one that keeps others waiting
            assert remainder.carry_over() == 0
            came = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    came.append(os.read(new.fd, 2048)[-10:])
            assert sorted(came)[-4:] == [b"datagram %d" % number for number in range(4)]
        finally:
            remainder.close()
            for tap in (old, new):
                os.close(tap.fd)


async def test_an_idle_tap_hears_nothing_and_says_nothing(world: World) -> None:
    """Only what is for the machine comes, and where it is; and who still speaks elsewhere takes it not back."""
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        old, idle = await slot.open_tap("q-old"), await slot.open_tap("q-idle")
        try:
            slot.switch("q-old")
            guest, gateway = bytes.fromhex(MAC.replace(":", "")), bytes.fromhex("52550a000202")
            ip("neigh", "add", "10.0.2.77", "lladdr", "52:54:00:00:00:77", "dev", "br0", inside=slot.name)
            with new_socket(slot.name, socket.SOCK_DGRAM) as speaking:
                for address in ("10.0.2.77", "10.0.2.15"):
                    speaking.sendto(b"x", (address, 5))
            for target in (b"\xff" * 6, b"\x01\0\x5e\0\0\1", b"\x52\x54\0\0\0\x77", gateway):
                os.write(old.fd, bytes(10) + target + guest + b"\x08\0" + b"not IP" * 8)
            for tap in (idle, old):
                assert os.read(tap.fd, 2048)[10:] == bytes(60)  # the one that keeps others waiting
            with pytest.raises(BlockingIOError):
                os.read(idle.fd, 2048)
            assert os.read(old.fd, 2048)[10:22] == guest + gateway
            with pytest.raises(BlockingIOError):
                os.read(old.fd, 2048)
            slot.switch("q-idle")
            os.write(old.fd, bytes(10) + gateway + guest + b"\x08\0" + b"not IP" * 8)
            assert slot.current_tap() == "q-idle"
        finally:
            os.close(old.fd)
            os.close(idle.fd)


async def test_a_switch_back_and_what_is_no_port(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        with pytest.raises(NotPossibleNow, match="no port of"):
            slot.current_tap()
        old, new = await slot.open_tap("q-old"), await slot.open_tap("q-new")
        try:
            for name in ("q-old", "q-new", "q-old"):
                slot.switch(name)
                assert slot.current_tap() == name
                entries = json.loads(_bridge(slot))
                assert [each["ifname"] for each in entries if each["mac"] == MAC] == [name]
            with pytest.raises(NotPossibleNow, match="«nothing»"):
                slot.switch("nothing")
            with pytest.raises(ResourceExhausted, match="no tap could be made"):
                await slot.open_tap("q-old")  # one queue, one process
            assert slot.current_tap() == "q-old"
        finally:
            os.close(new.fd)
        with pytest.raises(NotPossibleNow, match="can't switch to q-new"):
            slot.switch("q-new")
        os.close(old.fd)


def _bridge(slot: Slot) -> str:
    command = ["ip", "netns", "exec", slot.name, "bridge", "-j", "fdb", "show"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


async def test_what_is_started_inside_lives_there(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        with pytest.raises(InternalError, match="event loop"), slot.inside():
            pass

        def start() -> "subprocess.Popen[bytes]":
            with slot.inside():
                return subprocess.Popen(["sleep", "60"])

        def fail() -> None:
            with slot.inside():
                raise KeyError

        process = await asyncio.to_thread(start)
        try:
            there = Path(f"/proc/{process.pid}/ns/net").stat().st_ino
            assert there == slot.path.stat().st_ino
            here = await asyncio.to_thread(lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
            with pytest.raises(KeyError):
                await asyncio.to_thread(fail)
            for _ in range(3):
                assert await asyncio.to_thread(lambda: Path("/proc/thread-self/ns/net").stat().st_ino) == here
        finally:
            process.kill()
            process.wait()


# -- many --------------------------------------------------------------------------------------------------------------


async def test_a_hundred(world: World) -> None:
    async with _fabric(world) as fabric:
        slots = await asyncio.gather(*(fabric.take() for _ in range(100)))
        assert len({slot.address for slot in slots}) == 100
        assert fabric.room() == 253 - 100
        assert all(slot.path.exists() for slot in slots)
        await asyncio.gather(*(fabric.release(slot) for slot in slots))
        assert fabric.room() == 253
        assert not any(slot.path.exists() for slot in slots)
        await fabric.release(slots[0])  # twice is fine
        assert fabric.room() == 253


async def test_ready_ones_and_the_last_one(world: World) -> None:
    async with _fabric(world, ready=2, subnet=IPv4Network("10.112.0.0/29")) as fabric:
        assert fabric.room() == 5
        slots = [await fabric.take() for _ in range(5)]
        assert fabric.room() == 0
        with pytest.raises(ResourceExhausted, match=r"10\.112\.0\.0/29 holds 5 machines.*FORKY_SUBNET"):
            await fabric.take()
        guests = [world.guest(slot) for slot in slots]
        world.echo(guests[4], 80)
        assert ask(guests[0], str(slots[4].address), 80) == str(slots[0].address)
        await fabric.release(slots[0])
        assert fabric.room() == 1
        again = await fabric.take()
        assert again.address == slots[0].address
        world.echo(world.guest(again), 80)
        # its neighbours spoke to who had the address before, and reach the new one without having heard of it
        assert ask(guests[4], str(again.address), 80) == str(slots[4].address)


async def test_the_next_holder_of_an_address(world: World) -> None:
    """What is sent on to a machine that is gone does not reach the one that has its address now."""
    async with _fabric(world, subnet=IPv4Network("10.112.0.0/29")) as fabric:
        slots = [await fabric.take() for _ in range(5)]
        outside = new_socket(world.outside, socket.SOCK_DGRAM)
        outside.bind((OUTSIDE, 5000))
        with outside:
            with new_socket(world.guest(slots[0]), socket.SOCK_DGRAM) as sender:
                sender.bind(("0.0.0.0", 6000))
                sender.sendto(b"x", (OUTSIDE, 5000))
                _, peer = outside.recvfrom(10)
                outside.sendto(b"y", peer)
                assert sender.recv(10) == b"y"
            await fabric.release(slots[0])
            with new_socket(world.guest(await fabric.take()), socket.SOCK_DGRAM, timeout_s=0.2) as heir:
                heir.bind(("0.0.0.0", 6000))
                outside.sendto(b"y", peer)
                with pytest.raises(TimeoutError):
                    heir.recv(10)


async def test_a_pause_is_not_disturbed(world: World) -> None:
    async with _fabric(world) as fabric:
        slots = [await fabric.take() for _ in range(4)]
        async with fabric.calm():
            work = [asyncio.ensure_future(fabric.take()), asyncio.ensure_future(fabric.release(slots[0]))]
            await asyncio.sleep(0.1)
            assert not any(each.done() for each in work)
            assert slots[0].path.exists()
        await asyncio.gather(*work)
        assert not slots[0].path.exists()


async def test_a_slot_that_can_not_be_made_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _fabric(world) as fabric:
        tools = _tools_without_nft(world.directory)
        monkeypatch.setenv("PATH", str(tools))
        with pytest.raises(NotPossibleNow, match="«nft» is missing"):
            await fabric.take()
        monkeypatch.undo()
        assert fabric.room() == 253
        assert [name for name in namespace.names() if name.startswith(f"forky-{world.tag}")] == []
        assert (await fabric.take()).path.exists()


async def test_a_taker_that_gives_up(world: World) -> None:
    async with _fabric(world) as fabric:
        taking = asyncio.ensure_future(fabric.take())
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert fabric.room() == 253
        slot = await fabric.take()  # the one that was being made
        assert slot.name.endswith("-0")


# -- hostd dies --------------------------------------------------------------------------------------------------------


async def test_the_next_hostd_takes_up_what_is_there(world: World) -> None:
    async with _fabric(world, ready=2) as crashed:
        slot, forgotten = await crashed.take(), await crashed.take()
        guest = world.guest(slot, "q-0123")
        world.echo(world.outside, 80)
        world.echo(guest, 80)
        await slot.apply(NetworkPolicy(bandwidth_bytes_s=10**7))
        with connect(guest, OUTSIDE, 80) as outward, connect(world.host, str(slot.address), 80) as inward:
            assert talk(outward) == HOST
            after = Fabric(world.config(subnet=None), ready=0)
            await after.open()
            assert after.subnet == IPv4Network("10.112.0.0/24")  # not the one that would be chosen
            adopted = await after.adopt(slot.name)
            assert (adopted.name, adopted.address, adopted.path) == (slot.name, slot.address, slot.path)
            assert adopted.current_tap() == "q-0123"
            await adopted.check()
            with pytest.raises(NotFound):  # by a second machine
                await after.adopt(slot.name)
            await adopted.apply(NetworkPolicy(bandwidth_bytes_s=10**7))
            assert talk(outward) == HOST
            room = after.room()
            await after.sweep({slot.name})
            assert after.room() > room
            assert not forgotten.path.exists()
            assert talk(outward) == HOST
            assert talk(inward) == str(after.gateway)
            fresh = await after.take()
            assert fresh.name != slot.name
        for name in (forgotten.name, "forky-other-1", "forky-x", "../x"):
            with pytest.raises(NotFound):
                await after.adopt(name)
        await after.close(remove=False)
        assert adopted.path.exists()
        await Fabric(world.config()).close(remove=True)  # never opened
        assert world.leftovers() == []


async def test_a_machine_has_its_address_again_after_the_network_went(world: World) -> None:
    async with _fabric(world) as before:
        slots = [await before.take() for _ in range(3)]
        name, address = slots[2].name, slots[2].address
    async with _fabric(world, ready=2) as after:  # two are made ahead, as after every start
        first = await after.take()
        async with asyncio.timeout(30):
            while not slots[2].path.exists():
                await asyncio.sleep(0.01)
        with pytest.raises(NotFound):  # it is there, and for whoever comes next
            await after.adopt(name)
        again = await after.take_again(name)
        assert (again.name, again.address) == (name, address)
        assert {first.name, (await after.take()).name}.isdisjoint({name})
        tap = await again.open_tap()
        again.switch(tap.name)
        await again.check()
        os.close(tap.fd)
        with pytest.raises(NotPossibleNow):
            await again.check()  # its port has gone with the process
        again.at_no_port()
        await again.check()
        for taken in (first.name, name, "nonsense"):
            with pytest.raises(NotFound):
                await after.take_again(taken)


async def test_slots_of_others_are_left_alone(world: World) -> None:
    stranger = f"forky-{world.tag}-x-1"
    async with _fabric(world) as fabric:
        ip("netns", "add", stranger)
        try:
            neighbours = Fabric(
                world.config(instance=f"{world.tag}-n", bridge="fk-n", subnet=None, state=world.directory / "n.json"),
                ready=0,
            )
            await neighbours.open()
            theirs = await neighbours.take()
            assert neighbours.subnet == IPv4Network("10.112.16.0/20")
            await fabric.take()
            await fabric.sweep(set())
            await fabric.close(remove=True)
            assert theirs.path.exists()
            assert stranger in namespace.names()
            await theirs.check()
            assert sysctl.read("ipv4/conf/eth0/forwarding") == "1"  # they need it
            await neighbours.close(remove=True)
            assert not theirs.path.exists()
        finally:
            ip("netns", "del", stranger)


# -- damage ------------------------------------------------------------------------------------------------------------


def _remove_name(slot: Slot) -> None:
    ip("netns", "del", slot.name)


def _remove_rules(slot: Slot) -> None:
    within(slot.name, lambda: nft("flush", "ruleset"))


def _remove_address(slot: Slot) -> None:
    ip("addr", "del", f"{slot.address}/24", "dev", "up0", inside=slot.name)


def _remove_bridge(slot: Slot) -> None:
    ip("link", "del", "br0", inside=slot.name)


def _remove_cable(slot: Slot) -> None:
    ip("link", "del", "up0", inside=slot.name)


def _pull_cable(slot: Slot) -> None:
    ip("link", "set", slot.plan.link, "nomaster")


def _point_elsewhere(slot: Slot) -> None:
    within(slot.name, lambda: subprocess.run(["bridge", "fdb", "del", MAC, "dev", "q-1", "master"], check=True))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_remove_name, "its namespace .* was removed"),
        (_remove_rules, "nftables rules are gone"),
        (_remove_address, r"up0 has lost the address 10\.112\.0\.2"),
        (_remove_bridge, "interface br0 is gone"),
        (_remove_cable, "cable .* is gone"),
        (_pull_cable, "is not in fk-test"),
        (_point_elsewhere, "does not know that the machine is at q-1"),
    ],
)
async def test_damage_is_found_and_mended(world: World, damage: Callable[[Slot], None], complaint: str) -> None:
    async with _fabric(world) as fabric:
        slot, other = await fabric.take(), await fabric.take()
        tap = await slot.open_tap("q-1")
        try:
            slot.switch("q-1")
            policy = NetworkPolicy(mode=NetworkMode.ISOLATED, bandwidth_bytes_s=10**6)
            await slot.apply(policy)
            await slot.check()
            damage(slot)
            with pytest.raises(NotPossibleNow, match=complaint):
                await slot.check()
            await other.check()
            await slot.repair()
            await slot.check()
            assert slot.current_tap() == "q-1"
            assert str(slot.plan.subnet) in within(slot.name, lambda: nft("list", "chain", "inet", "forky", "outward"))
            assert "rate 8Mbit" in subprocess.run(["tc", "qdisc"], capture_output=True, text=True, check=True).stdout
            assert "rate 8Mbit" in within(
                slot.name, lambda: subprocess.run(["tc", "qdisc"], capture_output=True, text=True, check=True).stdout
            )
        finally:
            os.close(tap.fd)


async def test_a_removed_namespace_is_named(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        _remove_name(slot)
        with pytest.raises(NotPossibleNow, match=slot.name):
            await slot.open_tap()
        with pytest.raises(NotPossibleNow, match=slot.name):
            await slot.apply(NetworkPolicy(mode=NetworkMode.NONE))
        ip("netns", "add", slot.name)  # somebody made another of that name
        with pytest.raises(NotPossibleNow, match="another namespace"):
            await slot.check()
        with pytest.raises(NotPossibleNow, match="another namespace"):
            await slot.repair()
        await fabric.release(slot)
        assert fabric.room() == 253
        assert not slot.path.exists()


async def test_the_host_s_side_is_gone(world: World) -> None:
    """The bridge and the table were removed by somebody: the next hostd puts them back, and mends the slots."""
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        guest = world.guest(slot)
        world.echo(world.outside, 80)
        ip("link", "del", "fk-test")
        nft("flush", "ruleset")
        with pytest.raises(NotPossibleNow, match="bridge fk-test is gone"):
            await slot.check()
        after = Fabric(world.config(), ready=0)
        await after.open()
        adopted = await after.adopt(slot.name)
        with pytest.raises(NotPossibleNow, match="is not in fk-test"):
            await adopted.check()
        await adopted.repair()
        assert ask(guest, OUTSIDE, 80) == HOST
        await after.close(remove=False)


# -- the host ----------------------------------------------------------------------------------------------------------


async def test_forwarding_is_put_back(world: World) -> None:
    assert sysctl.read("ipv4/conf/eth0/forwarding") == "0"
    async with _fabric(world) as fabric:
        assert sysctl.read("ipv4/conf/eth0/forwarding") == "1"
        await fabric.close(remove=False)
        assert sysctl.read("ipv4/conf/eth0/forwarding") == "1"
        await fabric.open()  # and that it was off is still known
    assert sysctl.read("ipv4/conf/eth0/forwarding") == "0"
    assert not world.config().state.exists()
    sysctl.write("ipv4/ip_forward", "1")
    async with _fabric(world):
        pass
    assert sysctl.read("ipv4/conf/eth0/forwarding") == "1"  # was on before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"subnet": IPv4Network("198.18.0.0/25")},
            r"overlaps 198\.18\.0\.0/24, which the interface eth0 has.*FORKY_SUBNET",
        ),
        (
            {"subnet": IPv4Network("10.99.0.0/16")},
            r"overlaps 10\.99\.7\.0/24, which a route through eth0 has.*FORKY_SUBNET",
        ),
        ({"bridge": "eth0"}, "eth0 exists already and is not ours.*FORKY_BRIDGE"),
        ({"bridge": "a" * 16}, "at most 15.*FORKY_BRIDGE"),
        ({"mtu": 1279}, "MTU.*FORKY_MTU"),
    ],
)
async def test_clashes(world: World, changes: dict[str, object], complaint: str) -> None:
    ip("route", "add", "10.99.7.0/24", "via", OUTSIDE)
    before = ip("addr") + ip("route") + nft("list", "ruleset")
    with pytest.raises(InvalidRequest, match=complaint):
        await Fabric(world.config(**changes)).open()
    assert ip("addr") + ip("route") + nft("list", "ruleset") == before
    assert not world.config().state.exists()


async def test_settings_that_changed(world: World) -> None:
    async with _fabric(world) as fabric:
        slot = await fabric.take()
        for changes in ({"subnet": IPv4Network("10.113.0.0/24")}, {"bridge": "fk-renamed"}):
            with pytest.raises(InvalidRequest, match=r"machines stand on the bridge fk-test with the subnet 10\.112"):
                await Fabric(world.config(**changes)).open()
        await fabric.release(slot)
        await fabric.close(remove=False)
        async with _fabric(world, bridge="fk-renamed", subnet=IPv4Network("10.113.0.0/24"), mtu=1400) as renamed:
            assert str(renamed.gateway) == "10.113.0.1"
            slot = await renamed.take()
            for name in ("up0", "br0"):
                assert "mtu 1400" in ip("link", "show", name, inside=slot.name)
            tap = await slot.open_tap()
            assert "mtu 1400" in ip("link", "show", tap.name, inside=slot.name)
            os.close(tap.fd)
            assert "fk-test" not in ip("link")


async def test_what_the_host_lacks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() == []
    assert "br0" not in ip("link")
    monkeypatch.setenv("PATH", str(_tools_without_nft(world.directory)))
    with pytest.raises(NotPossibleNow, match=r"«nft» is missing.*install nftables"):
        await Fabric(world.config()).open()


def _tools_without_nft(directory: Path) -> Path:
    tools = directory / "tools"
    tools.mkdir(exist_ok=True)
    return tools
