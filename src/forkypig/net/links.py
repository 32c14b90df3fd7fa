"""Interfaces, addresses, routes and queues: the messages that make and change them, and what is read back.

Every function gives one message for `NetlinkSocket.request`, or takes a socket and reads. The numbers are those of
linux/if_link.h, linux/rtnetlink.h, linux/neighbour.h and linux/pkt_sched.h.
"""

import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from forkypig.net.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    message,
    nested,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
IFLA_PROTINFO, IFLA_IFALIAS, IFLA_GROUP = 12, 20, 27
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_MCAST_SNOOPING = 1, 5, 23
IFLA_BRPORT_MODE, IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD = 4, 8, 9
IFLA_BRPORT_MCAST_FLOOD, IFLA_BRPORT_BCAST_FLOOD = 27, 30
VETH_INFO_PEER = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
NDA_DST, NDA_LLADDR, NDA_MASTER = 1, 2, 9
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_MASTER = 0x02, 0x04
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TC_H_ROOT = 0xFFFFFFFF
IFF_UP = 1
RT_SCOPE_UNIVERSE, RTPROT_STATIC, RTN_UNICAST, RT_TABLE_MAIN = 0, 4, 1, 254


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as the kernel tells it."""

    index: int
    name: str
    kind: str  # "bridge", "veth", "tun", …; empty for hardware
    up: bool
    mtu: int
    master: int  # the index of its bridge; 0: none
    alias: str
    mac: bytes


@dataclass(frozen=True, slots=True)
class Route:
    """A route of IPv4, of whatever table."""

    network: IPv4Network
    interface: int  # index; 0: none
    metric: int
    main: bool  # in the main table


def _ifinfo(index: int = 0, flags: int = 0, change: int = 0, family: int = socket.AF_UNSPEC) -> bytes:
    return struct.pack("=BxHiII", family, 0, index, flags, change)


# -- making and changing -----------------------------------------------------------------------------------------------


def add_bridge(name: str, *, mac: bytes, mtu: int) -> bytes:
    """A bridge that is up, without spanning tree: a port forwards as soon as it is one.

    The MAC is fixed: a bridge without one takes the lowest of its ports', and changes it when ports come and go.
    """
    data = nested(
        IFLA_INFO_DATA,
        attribute(IFLA_BR_FORWARD_DELAY, 0),
        attribute(IFLA_BR_STP_STATE, 0),
        attribute(IFLA_BR_MCAST_SNOOPING, b"\0"),
    )
    return message(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _ifinfo(flags=IFF_UP, change=IFF_UP),
        attribute(IFLA_IFNAME, name),
        attribute(IFLA_ADDRESS, mac),
        attribute(IFLA_MTU, mtu),
        nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, "bridge"), data),
    )


def add_cable(
    name: str,
    *,
    far_name: str,
    far_mac: bytes,
    mtu: int,
    far_namespace: int | None = None,
) -> bytes:
    """A veth pair: this end up, the other in the namespace of the descriptor (without: in this one) and down.

    The kernel makes the other end first, and an end without its peer can't be up.
    """
    far = nested(
        VETH_INFO_PEER,
        _ifinfo(),
        attribute(IFLA_IFNAME, far_name),
        attribute(IFLA_ADDRESS, far_mac),
        attribute(IFLA_MTU, mtu),
        attribute(IFLA_NET_NS_FD, far_namespace) if far_namespace is not None else b"",
    )
    return message(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _ifinfo(flags=IFF_UP, change=IFF_UP),
        attribute(IFLA_IFNAME, name),
        attribute(IFLA_MTU, mtu),
        nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, "veth"), nested(IFLA_INFO_DATA, far)),
    )


def change_link(
    index: int,
    *,
    up: bool | None = None,
    master: int | None = None,
    mtu: int | None = None,
    group: int | None = None,
) -> bytes:
    """Changes what is given."""
    parts = [
        attribute(kind, value)
        for kind, value in (
            (IFLA_MASTER, master),
            (IFLA_MTU, mtu),
            (IFLA_GROUP, group),
        )
        if value is not None
    ]
    return message(RTM_NEWLINK, 0, _ifinfo(index, IFF_UP if up else 0, IFF_UP if up is not None else 0), *parts)


def set_alias(name: str, alias: str) -> bytes:
    """A remark on an interface, found by its name."""
    return message(RTM_NEWLINK, 0, _ifinfo(), attribute(IFLA_IFNAME, name), attribute(IFLA_IFALIAS, alias.encode()))


def quiet_port(index: int) -> bytes:
    """A port to which the bridge sends only what the forwarding table says, and from which it learns nothing."""
    quiet = (IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD, IFLA_BRPORT_MCAST_FLOOD, IFLA_BRPORT_BCAST_FLOOD)
    return _port(index, *(attribute(kind, b"\0") for kind in quiet))


def returning_port(index: int) -> bytes:
    """A port to which the bridge may also send what came in by it."""
    return _port(index, attribute(IFLA_BRPORT_MODE, b"\1"))


def _port(index: int, *settings: bytes) -> bytes:
    return message(RTM_SETLINK, 0, _ifinfo(index, family=socket.AF_BRIDGE), nested(IFLA_PROTINFO, *settings))


def remove_link(index: int) -> bytes:
    """Removes an interface (and a cable's other end)."""
    return message(RTM_DELLINK, 0, _ifinfo(index))


def remove_group(group: int) -> bytes:
    """Removes all interfaces of a group at once: the kernel waits for its readers once instead of once for each."""
    return message(RTM_DELLINK, 0, _ifinfo(), attribute(IFLA_GROUP, group))


def add_address(index: int, address: IPv4Address, prefix: int) -> bytes:
    """An address on an interface; no error if it is there."""
    return message(
        RTM_NEWADDR,
        NLM_F_CREATE | NLM_F_REPLACE,
        struct.pack("=BBBBi", socket.AF_INET, prefix, 0, RT_SCOPE_UNIVERSE, index),
        attribute(IFA_LOCAL, address.packed),
        attribute(IFA_ADDRESS, address.packed),
    )


def set_default_route(gateway: IPv4Address) -> bytes:
    """The default route, replaced if there is one."""
    return message(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        struct.pack(
            "=BBBBBBBBI",
            socket.AF_INET,
            0,
            0,
            0,
            RT_TABLE_MAIN,
            RTPROT_STATIC,
            RT_SCOPE_UNIVERSE,
            RTN_UNICAST,
            0,
        ),
        attribute(RTA_GATEWAY, gateway.packed),
    )


def _neighbour(family: int, index: int, state: int, flags: int, *parts: bytes) -> bytes:
    return message(
        RTM_NEWNEIGH,
        NLM_F_CREATE | NLM_F_REPLACE,
        struct.pack("=BxxxiHBB", family, index, state, flags, 0),
        *parts,
    )


def set_neighbour(index: int, address: IPv4Address, mac: bytes) -> bytes:
    """A neighbour entry that nobody has to ask for and that never ages."""
    return _neighbour(
        socket.AF_INET,
        index,
        NUD_PERMANENT,
        0,
        attribute(NDA_DST, address.packed),
        attribute(NDA_LLADDR, mac),
    )


def point_mac_at(port: int, mac: bytes) -> bytes:
    """`bridge fdb replace MAC dev PORT master static`: from now on the bridge sends what is for `mac` to that port."""
    return _neighbour(socket.AF_BRIDGE, port, NUD_NOARP, NTF_MASTER, attribute(NDA_LLADDR, mac))


def limit_rate(index: int, bytes_s: int, mtu: int) -> bytes:
    """A token bucket (tbf) at an interface's way out, replaced if there is one. `bytes_s` is the rate.

    It may run ahead by 20 ms worth of bytes, and queues 200 ms worth; both at least some full packets.
    """
    burst = max(bytes_s // 50, 4 * mtu)
    limit = max(bytes_s // 5, 16 * mtu)
    # linklayer 1 is Ethernet; set, it spares the table of rates that old kernels wanted.
    rate = struct.pack("=BBHhHI", 0, 1, 0, -1, 0, min(bytes_s, 0xFFFFFFFF))
    parameters = rate + struct.pack("=BBHhHI", 0, 0, 0, 0, 0, 0) + struct.pack("=III", min(limit, 0xFFFFFFFF), 0, 0)
    return message(
        RTM_NEWQDISC,
        NLM_F_CREATE | NLM_F_REPLACE,
        struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0, TC_H_ROOT, 0),
        attribute(TCA_KIND, "tbf"),
        nested(
            TCA_OPTIONS,
            attribute(TCA_TBF_PARMS, parameters),
            attribute(TCA_TBF_BURST, min(burst, 0xFFFFFFFF)),
            attribute(TCA_TBF_RATE64, struct.pack("=Q", bytes_s)) if bytes_s > 0xFFFFFFFF else b"",
        ),
    )


def unlimit_rate(socket_: NetlinkSocket, index: int) -> None:
    """Removes the token bucket of an interface if there is one."""
    request = message(
        RTM_DELQDISC, 0, struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0, TC_H_ROOT, 0), attribute(TCA_KIND, "tbf")
    )
    try:
        socket_.request(request)
    except NetlinkError as error:
        # Without a queue of somebody's the kernel says ENOENT; with its own default one, EINVAL.
        if error.errno not in {errno.ENOENT, errno.EINVAL}:
            raise


# -- reading -----------------------------------------------------------------------------------------------------------


def links(socket_: NetlinkSocket) -> list[Link]:
    """All interfaces of the namespace."""
    return [_link(body) for body in socket_.dump(RTM_GETLINK, _ifinfo())]


def _link(body: bytes) -> Link:
    _, index, flags, _ = struct.unpack_from("=BxxxiII", body)
    found = dict(attributes(body[16:]))
    info = dict(attributes(found.get(IFLA_LINKINFO, b"")))
    return Link(
        index=index,
        name=_text(found.get(IFLA_IFNAME, b"")),
        kind=_text(info.get(IFLA_INFO_KIND, b"")),
        up=bool(flags & IFF_UP),
        mtu=_number(found.get(IFLA_MTU)),
        master=_number(found.get(IFLA_MASTER)),
        alias=_text(found.get(IFLA_IFALIAS, b"")),
        mac=found.get(IFLA_ADDRESS, b""),
    )


def addresses(socket_: NetlinkSocket) -> list[tuple[int, IPv4Address, IPv4Network]]:
    """All IPv4 addresses of the namespace: (interface, address, its network)."""
    result = []
    for body in socket_.dump(RTM_GETADDR, struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)):
        _, prefix, _, _, index = struct.unpack_from("=BBBBi", body)
        found = dict(attributes(body[8:]))
        local = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
        if local is not None:
            peer = IPv4Network((found.get(IFA_ADDRESS, local), prefix), strict=False)
            result.append((index, IPv4Address(local), peer))
    return result


def routes(socket_: NetlinkSocket) -> list[Route]:
    """All IPv4 routes of the namespace, in all tables."""
    result = []
    for body in socket_.dump(RTM_GETROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
        _, prefix, _, _, table = struct.unpack_from("=BBBBB", body)
        found = dict(attributes(body[12:]))
        result.append(
            Route(
                network=IPv4Network((found.get(RTA_DST, b"\0\0\0\0"), prefix), strict=False),
                interface=_number(found.get(RTA_OIF)),
                metric=_number(found.get(RTA_PRIORITY)),
                main=table == RT_TABLE_MAIN,
            )
        )
    return result


def ports_of_mac(socket_: NetlinkSocket, mac: bytes) -> list[int]:
    """The ports (indexes) at which bridges of this namespace were told to find `mac`."""
    found = []
    for body in socket_.dump(RTM_GETNEIGH, struct.pack("=BxxxiHBB", socket.AF_BRIDGE, 0, 0, 0, 0)):
        _, index, _, flags, _ = struct.unpack_from("=BxxxiHBB", body)
        parts = dict(attributes(body[12:]))
        if parts.get(NDA_LLADDR) == mac and NDA_MASTER in parts and not flags & NTF_SELF:
            found.append(index)
    return found


def rate_limits(socket_: NetlinkSocket) -> dict[int, int]:
    """The token buckets of this namespace: interface -> bytes per second."""
    result = {}
    for body in socket_.dump(RTM_GETQDISC, struct.pack("=BxxxiIII", socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, index = struct.unpack_from("=Bxxxi", body)
        found = dict(attributes(body[20:]))
        if _text(found.get(TCA_KIND, b"")) == "tbf":
            options = dict(attributes(found[TCA_OPTIONS]))
            wide = options.get(TCA_TBF_RATE64)
            result[index] = (
                struct.unpack("=Q", wide)[0] if wide else struct.unpack_from("=8xI", options[TCA_TBF_PARMS])[0]
            )
    return result


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0
