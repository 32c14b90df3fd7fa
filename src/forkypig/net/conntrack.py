"""Making the host forget connections: NAT decides once per connection, and one over UDP may never end.

The messages are those of linux/netfilter/nfnetlink_conntrack.h.
"""

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

from forkypig.model.network import PortForward
from forkypig.net import links
from forkypig.net.netlink import NetlinkError, NetlinkSocket, attributes, message, nested

NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY = 1, 2
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST = 1, 2
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3

_FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


@dataclass(frozen=True, slots=True)
class _Tuple:
    source: bytes
    target: bytes
    protocol: int
    target_port: int


def forget_published(forward: PortForward, address: IPv4Address) -> None:
    """Ends what came in by a published port and went to `address`."""
    _forget({address.packed}, lambda first, answer: _is_to(first, forward) and answer.source == address.packed)


def forget_unpublished(forward: PortForward) -> None:
    """Ends what came to that port of this host before it was published."""
    with NetlinkSocket() as netlink:
        local = {address.packed for _, address, _ in links.addresses(netlink)}
    _forget(
        local, lambda first, answer: _is_to(first, forward) and first.target in local and answer.source == first.target
    )


def forget_machines(addresses: set[IPv4Address]) -> None:
    """Ends what machines that are gone had with anybody: who gets an address next hears nothing of it."""
    gone = {address.packed for address in addresses}
    _forget(gone, lambda first, answer: first.source in gone or answer.source in gone)


def _is_to(first: _Tuple, forward: PortForward) -> bool:
    return (first.protocol, first.target_port) == (_NUMBERS[forward.protocol], forward.host_port)


def _forget(hints: set[bytes], wanted: Callable[[_Tuple, _Tuple], bool]) -> None:
    """`hints`: one of these is in every entry that is wanted; a busy host has 100,000 others, not worth reading."""
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for body in netlink.dump(CT_GET, _FAMILY):
            if not any(hint in body for hint in hints):
                continue
            found = dict(attributes(body[4:]))
            first, answer = _tuple(found.get(CTA_TUPLE_ORIG, b"")), _tuple(found.get(CTA_TUPLE_REPLY, b""))
            if wanted(first, answer):
                try:
                    netlink.request(message(CT_DELETE, 0, _FAMILY, nested(CTA_TUPLE_ORIG, found[CTA_TUPLE_ORIG])))
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:  # ended by itself
                        raise


def _tuple(data: bytes) -> _Tuple:
    parts = dict(attributes(data))
    ends, protocol = dict(attributes(parts.get(CTA_TUPLE_IP, b""))), dict(attributes(parts.get(CTA_TUPLE_PROTO, b"")))
    return _Tuple(
        ends.get(CTA_IP_V4_SRC, b""),
        ends.get(CTA_IP_V4_DST, b""),
        protocol.get(CTA_PROTO_NUM, b"\0")[0],
        int.from_bytes(protocol.get(CTA_PROTO_DST_PORT, b""), "big"),
    )
