"""Published ports: an element of an nft map each, and a bound socket that keeps the port from others meanwhile."""

import errno
import socket
from ipaddress import AddressValueError, IPv4Address

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model.network import PortForward
from forkypig.net import nftables
from forkypig.net.conntrack import forget_published, forget_unpublished

EVERYWHERE = IPv4Address("0.0.0.0")  # noqa: S104  what the model calls «everyone»
_PROTOCOLS = {"tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP), "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP)}


class PublishedPorts:
    """The ports of one instance. Synchronous, in the host's namespace, one caller at a time."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._published: dict[PortForward, IPv4Address] = {}
        self._reserved: dict[PortForward, socket.socket] = {}

    def load(self) -> None:
        """Learns what an earlier hostd published; its rules still hold, its reservations went with it."""
        self._published = {}
        for element in nftables.elements("map", self._table, "anywhere"):
            (protocol, port), (address, guest_port) = (each["concat"] for each in element)
            self._published[PortForward(port, guest_port, protocol)] = IPv4Address(address)
        for element in nftables.elements("map", self._table, "somewhere"):
            (host, protocol, port), (address, guest_port) = (each["concat"] for each in element)
            self._published[PortForward(port, guest_port, protocol, host)] = IPv4Address(address)

    def of(self, address: IPv4Address) -> list[PortForward]:
        """What leads to a slot."""
        return [forward for forward, target in self._published.items() if target == address]

    def addresses(self) -> set[IPv4Address]:
        """The slots to which something leads."""
        return set(self._published.values())

    def publish(self, address: IPv4Address, forward: PortForward) -> None:
        """Makes a port lead to a slot. InvalidRequest when it can't be that port, NotPossibleNow when it is taken;
        published already is no error."""
        check(forward)
        for there, target in self._published.items():
            if _same_port(there, forward) and (target, there.guest_port) != (address, forward.guest_port):
                raise NotPossibleNow(f"{_port(forward)} is published already, for a machine: choose another")
        if forward not in self._reserved:
            self._reserved[forward] = _reserve(forward)
        try:
            nftables.load(f"add element inet {self._table} {_element(forward, address)}\n")
        except BaseException:
            if forward not in self._published:
                self._reserved.pop(forward).close()
            raise
        self._published[forward] = address
        if forward.protocol == "udp":
            # A sender that was there before would go on in the connection that it had: to the host, or to nobody.
            forget_unpublished(forward)

    def unpublish(self, address: IPv4Address, forward: PortForward) -> None:
        """Takes it back and ends the connections that came in by it. No error if it does not lead there."""
        if self._published.get(forward) != address:
            return
        nftables.load(f"delete element inet {self._table} {_element(forward, address)}\n")
        del self._published[forward]
        if (reservation := self._reserved.pop(forward, None)) is not None:
            reservation.close()
        forget_published(forward, address)

    def close(self) -> None:
        """Gives up the reservations; what is published stays."""
        for reservation in self._reserved.values():
            reservation.close()
        self._reserved.clear()


def check(forward: PortForward) -> None:
    """InvalidRequest for what is no port, no protocol or no address."""
    if forward.protocol not in _PROTOCOLS:
        raise InvalidRequest(f"«{forward.protocol}» can't be published: tcp or udp")
    for port in (forward.host_port, forward.guest_port):
        if not 1 <= port <= 65535:
            raise InvalidRequest(f"{port} is no port: from 1 to 65535")
    try:
        IPv4Address(forward.host_address)
    except AddressValueError as error:
        raise InvalidRequest(f"«{forward.host_address}» is no IPv4 address to publish a port on") from error


def _reserve(forward: PortForward) -> socket.socket:
    """Binds the port. Without SO_REUSEADDR: with it, other programs that have it too could still take the port."""
    kind, protocol = _PROTOCOLS[forward.protocol]
    reservation = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        reservation.bind((forward.host_address, forward.host_port))
    except OSError as error:
        reservation.close()
        if error.errno == errno.EADDRINUSE:
            raise NotPossibleNow(f"{_port(forward)} is in use by another program: choose another") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidRequest(f"{forward.host_address} is no address of this host: choose one that is") from error
        raise NotPossibleNow(f"{_port(forward)} can't be published: {error.strerror}") from error
    return reservation


def _same_port(one: PortForward, other: PortForward) -> bool:
    return (one.protocol, one.host_port, one.host_address) == (other.protocol, other.host_port, other.host_address)


def _port(forward: PortForward) -> str:
    where = "" if IPv4Address(forward.host_address) == EVERYWHERE else f" of {forward.host_address}"
    return f"port {forward.host_port}/{forward.protocol}{where} on this host"


def _element(forward: PortForward, address: IPv4Address) -> str:
    key, target = f"{forward.protocol} . {forward.host_port}", f"{address} . {forward.guest_port}"
    if IPv4Address(forward.host_address) == EVERYWHERE:
        return f"anywhere {{ {key} : {target} }}"
    return f"somewhere {{ {IPv4Address(forward.host_address)} . {key} : {target} }}"
