"""The settings of the network, the addresses that follow from them, and what they must not clash with. No I/O."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from forkypig.errors import InvalidRequest, ResourceExhausted

# What every machine sees, the same as in QEMU's user-mode network, so that a fork has nothing to configure anew.
GUEST = IPv4Address("10.0.2.15")
GATEWAY = IPv4Address("10.0.2.2")
RESOLVER = IPv4Address("10.0.2.3")
INSIDE = IPv4Network("10.0.2.0/24")
GUEST_MAC = bytes.fromhex("525400123456")
GATEWAY_MAC = bytes.fromhex("52550a000202")  # the one that QEMU's user-mode network uses

CHOICE = IPv4Network("10.112.0.0/12")  # where a subnet is looked for when none is set
CHOICE_PREFIX = 20
BRIDGE_PORTS = 1023  # net/bridge/br_private.h: BR_MAX_PORTS is 1 << 10, and port 0 is not used


@dataclass(frozen=True)
class NetworkConfig:
    """The settings of one instance's network. `check` says what is wrong with them."""

    instance: str  # tells apart the instances on one host: part of the names of namespaces and of the nft table
    bridge: str
    subnet: IPv4Network | None  # None: the first that is free
    mtu: int
    nameservers: tuple[str, ...]  # of outside names; empty: those of /etc/resolv.conf
    state: Path  # a file that remembers what was changed on the host, to put it back

    @property
    def table(self) -> str:
        """Our nft table in the host's namespace."""
        return f"forky-{self.instance}"

    @property
    def alias(self) -> str:
        """The mark on a bridge of ours (`ip link show` prints it)."""
        return f"forky {self.instance}"

    def slot_name(self, index: int) -> str:
        """The name of a slot's namespace."""
        return f"forky-{self.instance}-{index}"

    def slot_index(self, name: str) -> int | None:
        """The reverse; None for what is none of this instance's."""
        match = re.fullmatch(rf"forky-{re.escape(self.instance)}-([0-9]{{1,5}})", name)
        return int(match[1]) if match else None

    def link_name(self, index: int) -> str:
        """The host's end of a slot's cable: at most 15 bytes, and no other instance's."""
        return f"fk{hashlib.blake2s(self.instance.encode(), digest_size=3).hexdigest()}-{index}"

    @property
    def link_prefix(self) -> str:
        """What the names of all these begin with."""
        return self.link_name(0)[:-1]

    def link_index(self, name: str) -> int | None:
        """The reverse; None for what is none of this instance's."""
        _, _, index = name.partition("-")
        return int(index) if index.isdecimal() and name == self.link_name(int(index)) else None

    def check(self) -> None:
        """Raises InvalidRequest, naming the setting, for what could never work."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", self.instance):
            raise InvalidRequest(f"«{self.instance}» can't name an instance: use a-z, 0-9 and «-», at most 41 of them")
        if not 1 <= len(self.bridge.encode()) <= 15 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.bridge):
            raise InvalidRequest(
                f"«{self.bridge}» can't name a bridge: at most 15 letters, digits, «-», «_» and «.» (FORKY_BRIDGE)"
            )
        if not 1280 <= self.mtu <= 65521:
            raise InvalidRequest(f"an MTU of {self.mtu} is not possible: from 1280 to 65521 (FORKY_MTU)")
        if self.subnet is not None:
            if self.subnet.prefixlen > 29:
                raise InvalidRequest(f"the subnet {self.subnet} is too small: /29 at least (FORKY_SUBNET)")
            if self.subnet.overlaps(INSIDE):
                raise InvalidRequest(
                    f"the subnet {self.subnet} overlaps {INSIDE}, which every machine has inside: "
                    "choose another (FORKY_SUBNET)"
                )
            if self.subnet.is_loopback or self.subnet.is_multicast or self.subnet.is_link_local:
                raise InvalidRequest(f"{self.subnet} can't be given to machines: choose another (FORKY_SUBNET)")


@dataclass(frozen=True)
class Claim:
    """A range of addresses that the host uses already."""

    network: IPv4Network
    by: str  # for a person: "the interface eth0", "a route through tun0"


def capacity(subnet: IPv4Network) -> int:
    """How many slots fit: network, broadcast and the bridge's address are none, and a bridge has 1023 ports."""
    return min(subnet.num_addresses - 3, BRIDGE_PORTS)


def slot_address(subnet: IPv4Network, index: int) -> IPv4Address:
    """`index` counts from 0; the first address of the subnet is the bridge's."""
    return subnet.network_address + 2 + index


def link_mac(address: IPv4Address) -> bytes:
    """The MAC of whoever has `address` in the subnet: follows from it, so that nobody's neighbour entry goes stale."""
    return b"\x52\x56" + address.packed


def choose_subnet(wanted: IPv4Network | None, claims: Iterable[Claim]) -> IPv4Network:
    """The subnet to use. Raises InvalidRequest when the wanted one is in use, ResourceExhausted when none is free."""
    # A route to half of everything is a VPN's way to write a default route, and that one doesn't count.
    taken = [claim for claim in claims if claim.network.prefixlen > 1]
    if wanted is not None:
        for claim in taken:
            if claim.network.overlaps(wanted):
                raise InvalidRequest(
                    f"the subnet {wanted} overlaps {claim.network}, which {claim.by} has: choose another (FORKY_SUBNET)"
                )
        return wanted
    for subnet in CHOICE.subnets(new_prefix=CHOICE_PREFIX):
        if not any(claim.network.overlaps(subnet) for claim in taken):
            return subnet
    raise ResourceExhausted(
        f"every /{CHOICE_PREFIX} of {CHOICE} overlaps an address or a route of this host: "
        "name a free subnet (FORKY_SUBNET)"
    )
