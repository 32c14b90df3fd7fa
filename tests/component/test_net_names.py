"""The name server, asked by a machine over real UDP and TCP through its slot."""

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from forkypig.errors import NotPossibleNow
from forkypig.model.network import Egress, NetworkMode, NetworkPolicy
from forkypig.net.fabric import Fabric
from forkypig.net.names import OPEN_PER_MACHINE, NameServer
from forkypig.net.slot import Slot
from tests.component.net_rig import OUTSIDE, World, connect, needs_root, new_socket

pytestmark = needs_root


class Resolver:
    """A name server of the outside: answers everything with 192.0.2.1, over both transports; `mute` stops it."""

    def __init__(self, world: World) -> None:
        self.asked: list[str] = []
        self.mute = self.ended = False
        self._udp = new_socket(world.outside, socket.SOCK_DGRAM, timeout_s=0.1)
        self._udp.bind((OUTSIDE, 53))
        self._tcp = new_socket(world.outside, timeout_s=0.1)
        self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._tcp.bind((OUTSIDE, 53))
        self._tcp.listen()
        self._threads = [threading.Thread(target=self._serve_udp), threading.Thread(target=self._serve_tcp)]
        for thread in self._threads:
            thread.start()

    def _answer(self, data: bytes, *, full: bool) -> bytes:
        query = dns.message.from_wire(data)
        name = query.question[0].name
        self.asked.append(name.to_text())
        answer = dns.message.make_response(query)
        if name.to_text().startswith("big") and not full:
            answer.flags |= dns.flags.TC
        else:
            answer.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.1"))
        return answer.to_wire()

    def _serve_udp(self) -> None:
        while not self.ended:
            try:
                data, peer = self._udp.recvfrom(4096)
            except TimeoutError:
                continue
            if not self.mute:
                # A forged answer comes first: another number. It must not be taken.
                forged = dns.message.make_response(dns.message.from_wire(data))
                forged.id ^= 1
                self._udp.sendto(forged.to_wire(), peer)
                self._udp.sendto(self._answer(data, full=False), peer)

    def _serve_tcp(self) -> None:
        while not self.ended:
            try:
                connection, _ = self._tcp.accept()
            except TimeoutError:
                continue
            with connection:
                (length,) = struct.unpack("!H", connection.recv(2))
                answer = self._answer(connection.recv(length), full=True)
                connection.sendall(struct.pack("!H", len(answer)) + answer)

    def close(self) -> None:
        self.ended = True
        for thread in self._threads:
            thread.join(5)
        self._udp.close()
        self._tcp.close()


class Town:
    """A fabric with a machine and its names."""

    def __init__(self, world: World, fabric: Fabric, slot: Slot, guest: str, resolver: Resolver) -> None:
        self.world, self.fabric, self.slot, self.guest, self.resolver = world, fabric, slot, guest, resolver
        self.names = {"web": slot.address, "db": IPv4Address("10.112.0.9")}
        self.policy: NetworkPolicy | None = NetworkPolicy()
        self.failing = False

    def resolve(self, name: str, _asker: IPv4Address) -> IPv4Address | None:
        if self.failing:
            raise RuntimeError("a defect")
        return self.names.get(name)

    def name_of(self, address: IPv4Address, _asker: IPv4Address) -> str | None:
        return next((name for name, there in self.names.items() if there == address), None)

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        """What the machine hears from 10.0.2.3."""
        query = dns.message.make_query(name, kind)
        answer = dns.message.from_wire(await asyncio.to_thread(self.exchange, query.to_wire(), tcp=tcp))
        assert query.is_response(answer)
        return answer

    def exchange(self, data: bytes, *, tcp: bool = False, timeout_s: float = 20.0) -> bytes:
        if tcp:
            with connect(self.guest, "10.0.2.3", 53, timeout_s) as talking:
                talking.sendall(struct.pack("!H", len(data)) + data)
                (length,) = struct.unpack("!H", talking.recv(2))
                return talking.recv(length)
        with new_socket(self.guest, socket.SOCK_DGRAM, timeout_s) as asking:
            asking.sendto(data, ("10.0.2.3", 53))
            return asking.recv(4096)


@pytest.fixture
async def town(world: World) -> AsyncIterator[Town]:
    fabric = Fabric(world.config(nameservers=(OUTSIDE,)), ready=0)
    await fabric.open()
    slot = await fabric.take()
    resolver = Resolver(world)
    made = Town(world, fabric, slot, world.guest(slot), resolver)
    server = NameServer(fabric.config, made.resolve, policy_of=lambda _: made.policy, name_of=made.name_of)
    await server.open(fabric.gateway, fabric.subnet)
    try:
        yield made
    finally:
        await server.close()
        resolver.close()
        await fabric.close(remove=True)
    assert world.leftovers() == []


def _addresses(message: dns.message.Message) -> list[str]:
    return [item.to_text() for rrset in message.answer for item in rrset]


async def test_machines_by_name(town: Town) -> None:
    for tcp in (False, True):
        answer = await town.ask("DB.forky", tcp=tcp)
        assert answer.rcode() == dns.rcode.NOERROR
        assert _addresses(answer) == ["10.112.0.9"]
        assert answer.answer[0].ttl == 1
    assert _addresses(await town.ask("web.forky")) == [str(town.slot.address)]
    town.names["web"] = IPv4Address("10.112.0.77")
    assert _addresses(await town.ask("web.forky")) == ["10.112.0.77"]
    empty = await town.ask("web.forky", "AAAA")
    assert (empty.rcode(), empty.answer) == (dns.rcode.NOERROR, [])
    for name in ("none.forky", "a.web.forky"):
        for kind in ("A", "AAAA"):
            assert (await town.ask(name, kind)).rcode() == dns.rcode.NXDOMAIN
    assert (await town.ask("forky")).rcode() == dns.rcode.NOERROR
    assert _addresses(await town.ask("9.0.112.10.in-addr.arpa", "PTR")) == ["db.forky."]
    assert (await town.ask("8.0.112.10.in-addr.arpa", "PTR")).rcode() == dns.rcode.NXDOMAIN
    assert town.resolver.asked == []  # none of it went out


async def test_names_of_outside(town: Town) -> None:
    for tcp in (False, True):
        assert _addresses(await town.ask("example.com", tcp=tcp)) == ["192.0.2.1"]
    cut = await town.ask("big.example.com")
    assert cut.flags & dns.flags.TC
    assert _addresses(await town.ask("big.example.com", tcp=True)) == ["192.0.2.1"]
    assert _addresses(await town.ask("1.2.0.192.in-addr.arpa", "PTR")) == ["192.0.2.1"]
    town.resolver.mute = True
    assert (await town.ask("example.com")).rcode() == dns.rcode.SERVFAIL
    assert _addresses(await town.ask("db.forky")) == ["10.112.0.9"]


async def test_names_are_a_way_out_too(town: Town) -> None:
    for policy in (
        NetworkPolicy(egress=Egress(())),
        NetworkPolicy(mode=NetworkMode.ISOLATED),
        None,  # nobody knows who asks
    ):
        town.policy = policy
        if policy is not None:
            await town.slot.apply(policy)
        for tcp in (False, True):
            assert (await town.ask("secret.example.com", tcp=tcp)).rcode() == dns.rcode.REFUSED
            assert _addresses(await town.ask("db.forky", tcp=tcp)) == ["10.112.0.9"]
    assert town.resolver.asked == []


async def test_what_is_no_question(town: Town) -> None:
    good = dns.message.make_query("db.forky", "A").to_wire()
    reply = dns.message.make_response(dns.message.make_query("db.forky", "A")).to_wire()
    for packet in (b"", b"\0", b"\xff" * 512, good[:-3], good[:12], good[:4] + b"\0\xff" + good[6:], reply):
        with new_socket(town.guest, socket.SOCK_DGRAM, 0.1) as asking:
            asking.sendto(packet, ("10.0.2.3", 53))
            if packet == good[:12]:
                continue
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(asking.recv, 4096)
    for data in (b"\0", b"\0\0", b"\xff\xff" + b"x" * 100, b"\0\5hello"):
        talking = await asyncio.to_thread(connect, town.guest, "10.0.2.3", 53)
        with talking:
            talking.sendall(data)
    twice = dns.message.from_wire(good)
    twice.question.append(twice.question[0])
    answer = dns.message.from_wire(await asyncio.to_thread(town.exchange, twice.to_wire()))
    assert answer.rcode() == dns.rcode.FORMERR
    update = dns.message.from_wire(await asyncio.to_thread(town.exchange, good[:2] + b"\x10\0" + good[4:]))
    assert update.rcode() == dns.rcode.NOTIMP
    town.failing = True  # a defect in what it asks is no end either
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(town.exchange, good, timeout_s=0.2)
    town.failing = False
    assert _addresses(await town.ask("db.forky")) == ["10.112.0.9"]


async def test_one_machine_can_not_hold_them_all(town: Town) -> None:
    town.resolver.mute = True
    with new_socket(town.guest, socket.SOCK_DGRAM, 0.3) as asking:
        for number in range(OPEN_PER_MACHINE + 20):
            asking.sendto(dns.message.make_query(f"n{number}.example.com", "A").to_wire(), ("10.0.2.3", 53))
        asking.sendto(dns.message.make_query("db.forky", "A").to_wire(), ("10.0.2.3", 53))
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(asking.recv, 4096)
    # while others are served
    query = dns.message.make_query("db.forky", "A")
    with new_socket(town.world.host, socket.SOCK_DGRAM) as other:
        other.sendto(query.to_wire(), (str(town.fabric.gateway), 53))
        assert _addresses(dns.message.from_wire(await asyncio.to_thread(other.recv, 4096))) == ["10.112.0.9"]


async def test_the_port_is_taken(world: World) -> None:
    fabric = Fabric(world.config(), ready=0)
    await fabric.open()
    try:
        with new_socket(world.host, socket.SOCK_DGRAM) as other:
            other.bind(("0.0.0.0", 53))
            server = NameServer(fabric.config, lambda *_: None, policy_of=lambda _: None, name_of=lambda *_: None)
            with pytest.raises(NotPossibleNow, match=r"port 53 of 10\.112\.0\.1 can't be had"):
                await server.open(fabric.gateway, fabric.subnet)
    finally:
        await fabric.close(remove=True)
