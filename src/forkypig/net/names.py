"""The name server of the machines: NAME.forky for each other, and what the host can resolve.

It listens on the bridge's address, in the host's namespace; slots lead 10.0.2.3:53 there. Whatever comes in is from a
machine, so nothing in it is believed: what can't be read is dropped, and nobody can have too many questions open.
"""

import asyncio
import contextlib
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Any, cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset
import structlog

from forkypig.errors import NotPossibleNow
from forkypig.model.network import NetworkMode, NetworkPolicy
from forkypig.net.config import NetworkConfig
from forkypig.net.upstream import PORT, Upstream

log = structlog.get_logger()

ZONE = dns.name.from_text("forky.")
REVERSE = dns.name.from_text("in-addr.arpa.")
TTL_S = 1  # a name may lead to another machine a moment later

# A question of outside waits up to 4 s; a program that asks for a hundred names at once is served.
OPEN_PER_MACHINE = 128
# A connection without a question for as long is closed; RFC 7766 asks for "a few seconds".
TCP_IDLE_S = 10.0


class NameServer:
    """Answers over UDP and TCP."""

    def __init__(
        self,
        config: NetworkConfig,
        resolve: Callable[[str, IPv4Address], IPv4Address | None],
        *,
        policy_of: Callable[[IPv4Address], NetworkPolicy | None],
        name_of: Callable[[IPv4Address, IPv4Address], str | None],
    ) -> None:
        """`resolve` and `name_of` know the machines that whoever asks, from the second address, may know; `policy_of`
        what the machine with an address may do."""
        self._resolve, self._policy_of, self._name_of = resolve, policy_of, name_of
        self._upstream = Upstream(config.nameservers)
        self._subnet = IPv4Network("0.0.0.0/32")
        self._open: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None

    async def open(self, address: IPv4Address, subnet: IPv4Network) -> None:
        """Listens on port 53 of `address`; machines are in `subnet`. NotPossibleNow when the port can't be had."""
        self._subnet = subnet
        try:
            self._tcp = await asyncio.start_server(self._serve_tcp, str(address), PORT)
            self._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Udp(self), local_addr=(str(address), PORT)
            )
        except OSError as error:
            await self.close()
            raise NotPossibleNow(
                f"port {PORT} of {address} can't be had ({error.strerror}): a name server that listens on all "
                "addresses of this host must leave that one out"
            ) from error

    async def close(self) -> None:
        """Stops listening; questions that are open get no answer."""
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._udp, self._tcp = None, None

    # -- transports ---------------------------------------------------------------------------------------------------

    def received(self, transport: asyncio.DatagramTransport, data: bytes, peer: tuple[str, int]) -> None:
        """A packet over UDP."""
        self._start(peer[0], self._serve_udp(transport, data, peer))

    async def _serve_udp(self, transport: asyncio.DatagramTransport, data: bytes, peer: tuple[str, int]) -> None:
        answer = await self.answer(data, peer[0], tcp=False)
        if answer is not None and not transport.is_closing():
            transport.sendto(answer, peer)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if peer is None or not self._start(peer[0], self._converse(reader, writer, peer[0])):
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                while True:
                    async with asyncio.timeout(TCP_IDLE_S):
                        (length,) = struct.unpack("!H", await reader.readexactly(2))
                        data = await reader.readexactly(length)
                        answer = await self.answer(data, peer, tcp=True)
                        if answer is None:
                            return
                        writer.write(struct.pack("!H", len(answer)) + answer)
                        await writer.drain()
        finally:
            writer.close()

    def _start(self, peer: str, work: Coroutine[Any, Any, None]) -> bool:
        if self._open[peer] >= OPEN_PER_MACHINE:
            work.close()
            return False
        self._open[peer] += 1
        task = asyncio.create_task(work, name=f"dns-{peer}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(peer, done))
        return True

    def _ended(self, peer: str, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("name-server-failed", machine=peer, error=repr(error))

    # -- answers ------------------------------------------------------------------------------------------------------

    async def answer(self, data: bytes, peer: str, *, tcp: bool) -> bytes | None:
        """What to send back for a packet from `peer`; None: nothing."""
        try:
            query = dns.message.from_wire(data)
        except Exception:  # dnspython's parser is fed what a machine made up; some of that raises other than its own
            return None
        if query.flags & dns.flags.QR:
            return None
        if query.opcode() != dns.opcode.QUERY:
            return _reply(query, dns.rcode.NOTIMP)
        if len(query.question) != 1:
            return _reply(query, dns.rcode.FORMERR)
        question = query.question[0]
        if question.rdclass != dns.rdataclass.IN:
            return _reply(query, dns.rcode.REFUSED)
        if question.name.is_subdomain(ZONE):
            return self._answer_name(query, question, IPv4Address(peer))
        if (address := _reverse(question.name)) is not None and address in self._subnet:
            return self._answer_address(query, question, address, IPv4Address(peer))
        policy = self._policy_of(IPv4Address(peer))
        # A question carries what its name says to whoever answers it: a way out like any other.
        if policy is None or policy.mode is not NetworkMode.NAT or policy.egress.denied:
            return _reply(query, dns.rcode.REFUSED)
        return await self._upstream.ask(data, tcp=tcp) or _reply(query, dns.rcode.SERVFAIL)

    def _answer_name(self, query: dns.message.Message, question: dns.rrset.RRset, peer: IPv4Address) -> bytes:
        labels = question.name.relativize(ZONE).labels
        if not labels:
            return _reply(query, dns.rcode.NOERROR)
        name = labels[0].decode("ascii", "replace").lower()
        address = self._resolve(name, peer) if len(labels) == 1 else None
        if address is None:
            return _reply(query, dns.rcode.NXDOMAIN)
        if question.rdtype not in {dns.rdatatype.A, dns.rdatatype.ANY}:
            return _reply(query, dns.rcode.NOERROR)
        return _reply(query, dns.rcode.NOERROR, dns.rrset.from_text(question.name, TTL_S, "IN", "A", str(address)))

    def _answer_address(
        self, query: dns.message.Message, question: dns.rrset.RRset, address: IPv4Address, peer: IPv4Address
    ) -> bytes:
        name = self._name_of(address, peer)
        if name is None:
            return _reply(query, dns.rcode.NXDOMAIN)
        if question.rdtype not in {dns.rdatatype.PTR, dns.rdatatype.ANY}:
            return _reply(query, dns.rcode.NOERROR)
        return _reply(
            query, dns.rcode.NOERROR, dns.rrset.from_text(question.name, TTL_S, "IN", "PTR", f"{name}.forky.")
        )


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is none by inheritance

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._server.received(self._transport, data, addr)

    def error_received(self, exc: Exception) -> None:
        """A machine that asked has gone meanwhile: nothing to do."""


def _reply(query: dns.message.Message, rcode: dns.rcode.Rcode, *answers: dns.rrset.RRset) -> bytes:
    reply = dns.message.make_response(query, recursion_available=True)
    reply.set_rcode(rcode)
    reply.answer.extend(answers)
    return reply.to_wire()


def _reverse(name: dns.name.Name) -> IPv4Address | None:
    """The address that a reverse name is of; None for what is none, or of a part of an address."""
    if not name.is_subdomain(REVERSE):
        return None
    try:
        return IPv4Address(dns.reversename.to_address(name))
    except (dns.exception.DNSException, AddressValueError, ValueError):
        return None
