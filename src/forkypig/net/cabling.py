"""A slot's interfaces: making them, finding what is missing, putting it back. Synchronous; for worker threads."""

import contextlib
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from forkypig.model.network import NetworkPolicy
from forkypig.net import links, namespace, nftables, rules, sysctl
from forkypig.net.config import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, INSIDE, RESOLVER, link_mac
from forkypig.net.netlink import NetlinkError, NetlinkSocket
from forkypig.net.rules import BRIDGE, SLOT_TABLE, UPLINK

# Of a slot's namespace. Some start with what the host has set for itself, so nothing is left to chance.
SETTINGS = {
    "ipv4/ip_forward": "1",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv4/icmp_ratelimit": "0",  # every refused packet is answered, not one a second
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    # A segment from the middle of a connection that is not known opens none (see rules.py) …
    "netfilter/nf_conntrack_tcp_loose": "0",
    # … and one that is known may be out of the window that conntrack believes in.
    "netfilter/nf_conntrack_tcp_be_liberal": "1",
    # Frames are bridged between tap and br0 only; the rules are for what is routed.
    "bridge/bridge-nf-call-iptables": "0",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a slot is made from."""

    name: str
    address: IPv4Address
    subnet: IPv4Network
    gateway: IPv4Address  # the host's bridge
    bridge: str  # its name
    link: str  # the host's end of the cable
    mtu: int
    host_table: str

    @property
    def path(self) -> Path:
        """Where the namespace is mounted."""
        return namespace.DIRECTORY / self.name


def slot_rules(plan: Plan, policy: NetworkPolicy) -> str:
    """The rules of this slot under a policy."""
    return rules.slot_rules(plan.address, plan.subnet, plan.gateway, policy)


def build(plan: Plan) -> NetlinkSocket:
    """Makes a slot with the default policy. Gives a socket in it; after a failure nothing is left."""
    namespace.create(plan.path)
    try:
        furnish(plan, NetworkPolicy())
        with namespace.inside(plan.path):
            nftables.load(slot_rules(plan, NetworkPolicy()))
            return NetlinkSocket()
    except BaseException:
        cut_off([plan], 0)
        raise


def furnish(plan: Plan, policy: NetworkPolicy) -> None:
    """Interfaces, addresses and kernel settings of a slot: adds what is missing."""
    with contextlib.ExitStack() as stack:
        inner = stack.enter_context(open_inside(plan.path))
        outer = stack.enter_context(NetlinkSocket())
        with namespace.inside(plan.path):
            for key, value in SETTINGS.items():
                if sysctl.read(key) is not None:
                    sysctl.write(key, value)
        there = {link.name: link for link in links.links(inner)}
        if UPLINK not in there:
            with plan.path.open("rb") as target:
                outer.request(
                    links.add_cable(
                        plan.link,
                        far_name=UPLINK,
                        far_mac=link_mac(plan.address),
                        far_namespace=target.fileno(),
                        mtu=plan.mtu,
                    )
                )
        if BRIDGE not in there:
            inner.request(links.add_bridge(BRIDGE, mac=GATEWAY_MAC, mtu=plan.mtu))
        now = {link.name: link for link in links.links(inner)}
        uplink, bridge = now[UPLINK].index, now[BRIDGE].index
        cable = socket.if_nametoindex(plan.link)
        outer.request(
            links.change_link(cable, up=True, master=socket.if_nametoindex(plan.bridge)),
            # A machine may come by a port of the host that leads to itself; with br_netfilter that is bridged.
            links.returning_port(cable),
        )
        inner.request(
            links.change_link(now["lo"].index, up=True),
            # Said again: only what is set, not what it was made with, stays when ports come and go.
            links.change_link(bridge, up=True, mtu=plan.mtu),
            links.change_link(uplink, up=True),
            links.add_address(bridge, GATEWAY, INSIDE.prefixlen),
            links.add_address(bridge, RESOLVER, INSIDE.prefixlen),
            links.set_neighbour(bridge, GUEST, GUEST_MAC),
            links.add_address(uplink, plan.address, plan.subnet.prefixlen),
            links.set_default_route(plan.gateway),
        )
        for link in now.values():
            if link.kind == "tun" and link.master != bridge:
                inner.request(links.change_link(link.index, master=bridge, up=True), links.quiet_port(link.index))


def cut_off(plans: list[Plan], group: int) -> None:
    """Removes the cables of slots, all in one go, and their names. What is gone is no error.

    Then nothing reaches them any more. The kernel removes a namespace later, when no process and no socket is in it.
    """
    names = {plan.link for plan in plans}
    with NetlinkSocket() as netlink:
        found = [link.index for link in links.links(netlink) if link.name in names]
        if len(found) == 1:
            netlink.request(links.remove_link(found[0]))
        elif found:
            netlink.request(*(links.change_link(index, group=group) for index in found))
            netlink.request(links.remove_group(group))
    for plan in plans:
        namespace.remove(plan.path)


def dissolve(inner: NetlinkSocket) -> None:
    """Removes the bridge of a slot that was cut off, by a socket in there, and closes the socket.

    The kernel would remove it as well, with the namespace, but many at a time: see calm.py.
    """
    with inner, contextlib.suppress(NetlinkError):
        for link in links.links(inner):
            if link.name == BRIDGE:
                inner.request(links.remove_link(link.index))


def faults_outside(plan: Plan) -> list[str]:
    """What the host lacks of this slot, for a person."""
    with NetlinkSocket() as netlink:
        there = {link.name: link for link in links.links(netlink)}
    cable, bridge = there.get(plan.link), there.get(plan.bridge)
    if bridge is None:
        return [f"the host's bridge {plan.bridge} is gone"]
    if cable is None:
        return [f"its cable {plan.link} is gone"]
    faults = []
    if cable.master != bridge.index:
        faults.append(f"its cable {plan.link} is not in {plan.bridge}")
    if not cable.up or not bridge.up:
        faults.append(f"{plan.link if not cable.up else plan.bridge} is down")
    return faults


def faults_inside(plan: Plan, port: str | None) -> list[str]:
    """What the namespace of this thread lacks, for a person. `port` is where the machine ought to be, if known."""
    faults = []
    with NetlinkSocket() as netlink:
        there = {link.name: link for link in links.links(netlink)}
        held = {(index, address) for index, address, _ in links.addresses(netlink)}
        default = any(route.network.prefixlen == 0 and route.main for route in links.routes(netlink))
        ports = links.ports_of_mac(netlink, GUEST_MAC)
    for name, wanted in ((UPLINK, (plan.address,)), (BRIDGE, (GATEWAY, RESOLVER))):
        link = there.get(name)
        if link is None:
            faults.append(f"its interface {name} is gone")
            continue
        if not link.up:
            faults.append(f"its interface {name} is down")
        faults += [f"{name} has lost the address {each}" for each in wanted if (link.index, each) not in held]
    if not default and not faults:
        faults.append("its default route is gone")
    if port is not None:
        if port not in there:
            faults.append(f"the machine's port {port} is gone")
        elif there[port].index not in ports:
            faults.append(f"its bridge does not know that the machine is at {port}")
    if not {f"inet {SLOT_TABLE}", f"netdev {SLOT_TABLE}"} <= nftables.tables():
        faults.append("its nftables rules are gone")
    return faults


def open_inside(path: Path) -> NetlinkSocket:
    """A socket of that namespace, for whichever thread. FileNotFoundError if it is gone."""
    namespace.identity(path)
    with namespace.inside(path):
        return NetlinkSocket()
