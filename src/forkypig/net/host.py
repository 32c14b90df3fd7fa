"""What an instance needs of the host itself: its bridge, its nft table, forwarding. Synchronous; for worker threads.

Only what carries our name is made, changed and removed. The one thing that is the host's own, forwarding on the
interface of the default route, is noted in a file before it is turned on, and put back.
"""

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.net import apart, links, nftables, rules, sysctl
from forkypig.net.config import Claim, NetworkConfig, choose_subnet, link_mac
from forkypig.net.links import Link
from forkypig.net.netlink import NetlinkError, NetlinkSocket

log = structlog.get_logger()

ALIAS_PREFIX = "forky "


@dataclass(frozen=True, slots=True)
class Ground:
    """What is the same for all slots of an instance."""

    subnet: IPv4Network
    gateway: IPv4Address
    mtu: int


def lay(config: NetworkConfig, *, in_use: bool) -> Ground:
    """Makes the bridge, table and settings, or takes up those that are there. `in_use`: there are slots.

    Raises InvalidRequest, naming what is in the way and the setting, for a clash; then nothing has been changed.
    """
    config.check()
    with NetlinkSocket() as netlink:
        ground = _find_or_make_bridge(config, netlink, in_use=in_use)
        for key, value in (
            (f"ipv4/conf/{config.bridge}/forwarding", "1"),
            (f"ipv4/conf/{config.bridge}/route_localnet", "1"),  # ports published on 127.0.0.1
            (f"ipv6/conf/{config.bridge}/disable_ipv6", "1"),
        ):
            if sysctl.read(key) is not None:
                sysctl.write(key, value)
        for name in _ways_out(netlink):
            _forward_on(config.state, name)
    nftables.load(rules.host_rules(config.table, config.bridge, ground.subnet, ground.gateway))
    return ground


def clear(config: NetworkConfig) -> None:
    """Removes all that `lay` made and puts back what it changed. What is gone already is no error."""
    with NetlinkSocket() as netlink:
        for link in links.links(netlink):
            if link.alias == config.alias and link.kind == "bridge":
                netlink.request(links.remove_link(link.index))
        others = any(link.alias.startswith(ALIAS_PREFIX) for link in links.links(netlink))
    nftables.load(f"add table inet {config.table}\ndelete table inet {config.table}\n")
    apart.remove(config.table)
    _forward_back(config.state, keep=others)


def _find_or_make_bridge(config: NetworkConfig, netlink: NetlinkSocket, *, in_use: bool) -> Ground:
    there = links.links(netlink)
    mine = next((link for link in there if link.alias == config.alias and link.kind == "bridge"), None)
    if mine is not None:
        ground = _ground_of(mine, netlink)
        fits = ground is not None and mine.name == config.bridge and config.subnet in {None, ground.subnet}
        if ground is not None and in_use:
            if not fits:
                raise InvalidRequest(
                    f"machines stand on the bridge {mine.name} with the subnet {ground.subnet}: leave FORKY_BRIDGE and "
                    "FORKY_SUBNET as they were until they are removed"
                )
            if mine.mtu != config.mtu:
                log.warning("mtu-kept", bridge=mine.name, mtu=mine.mtu, wanted=config.mtu, reason="machines use it")
        if ground is not None and fits and (in_use or mine.mtu == config.mtu):
            netlink.request(links.change_link(mine.index, up=True))
            return ground
        netlink.request(links.remove_link(mine.index))
        there = links.links(netlink)
    _refuse_name(config, there)
    subnet = choose_subnet(config.subnet, _claims(netlink, there))
    gateway = subnet.network_address + 1
    try:
        # Both in one call to the kernel: were we killed in between, the bridge would be nobody's.
        netlink.request(
            links.add_bridge(config.bridge, mac=link_mac(gateway), mtu=config.mtu),
            links.set_alias(config.bridge, config.alias),
        )
    except NetlinkError as error:
        raise NotPossibleNow(f"the bridge {config.bridge} could not be made: {error.strerror}") from error
    index = socket.if_nametoindex(config.bridge)
    try:
        netlink.request(
            links.change_link(index, mtu=config.mtu),
            links.add_address(index, gateway, subnet.prefixlen),
        )
    except BaseException:
        netlink.request(links.remove_link(index))
        raise
    log.info("network-made", bridge=config.bridge, subnet=str(subnet), mtu=config.mtu)
    return Ground(subnet, gateway, config.mtu)


def _ground_of(bridge: Link, netlink: NetlinkSocket) -> Ground | None:
    """What an earlier hostd chose, as it stands on the bridge; None if it has lost its address."""
    for index, address, network in links.addresses(netlink):
        if index == bridge.index and address == network.network_address + 1:
            return Ground(network, address, bridge.mtu)
    return None


def _refuse_name(config: NetworkConfig, there: list[Link]) -> None:
    for link in there:
        if link.name == config.bridge:
            whose = f"of the instance «{link.alias.removeprefix(ALIAS_PREFIX)}»" if _is_ours(link) else "not ours"
            raise InvalidRequest(
                f"an interface {config.bridge} exists already and is {whose}: choose another name (FORKY_BRIDGE)"
            )


def _is_ours(link: Link) -> bool:
    return link.alias.startswith(ALIAS_PREFIX)


def _claims(netlink: NetlinkSocket, there: list[Link]) -> list[Claim]:
    names = {link.index: link.name for link in there}
    claims = [
        Claim(network, f"the interface {names.get(index, index)}") for index, _, network in links.addresses(netlink)
    ]
    for route in links.routes(netlink):
        through = f"through {names[route.interface]}" if route.interface in names else "without an interface"
        claims.append(Claim(route.network, f"a route {through}"))
    return claims


# -- forwarding --------------------------------------------------------------------------------------------------------


def _ways_out(netlink: NetlinkSocket) -> list[str]:
    """The interface of the default route that is used; answers from outside come in there."""
    names = {link.index: link.name for link in links.links(netlink)}
    found = [route for route in links.routes(netlink) if route.main and route.network.prefixlen == 0]
    found.sort(key=lambda route: route.metric)
    return [names[route.interface] for route in found[:1] if route.interface in names]


def _forward_on(state: Path, interface: str) -> None:
    key = f"ipv4/conf/{interface}/forwarding"
    before = sysctl.read(key)
    if before in {None, "1"}:
        return
    noted = _read_state(state)
    noted.setdefault(interface, str(before))
    _write_state(state, noted)
    sysctl.write(key, "1")
    log.info("forwarding-on", interface=interface)


def _forward_back(state: Path, *, keep: bool) -> None:
    """`keep`: another instance of ours needs it. Whoever turned it on for all interfaces needs it too."""
    if not keep and sysctl.read("ipv4/conf/all/forwarding") != "1":
        for interface, value in _read_state(state).items():
            with contextlib.suppress(FileNotFoundError):
                sysctl.write(f"ipv4/conf/{interface}/forwarding", value)
    state.unlink(missing_ok=True)


def _read_state(state: Path) -> dict[str, str]:
    try:
        content = json.loads(state.read_text())
        return {str(name): str(value) for name, value in content["forwarding"].items()}
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return {}


def _write_state(state: Path, forwarding: dict[str, str]) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    new = state.with_name(state.name + ".new")
    with new.open("w") as file:
        json.dump({"forwarding": forwarding}, file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(state)
