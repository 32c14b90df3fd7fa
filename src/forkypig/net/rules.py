"""The nftables rules, as text: of a slot (NAT and policy) and of the host. Pure; `nftables` applies them.

Each text can be applied again and again: it adds what is missing and replaces the rules, in one transaction, while the
kernel keeps its connections and their NAT, and while maps keep their elements.

A policy is a function of who began a connection and where to, and is asked for *every* packet: `ct original` is what
the first packet said before NAT. There is no «established: accept» in front of it, so a changed policy also holds for
the connections that are open.
"""

from ipaddress import IPv4Address, IPv4Network, collapse_addresses

from forkypig.model.network import NetworkMode, NetworkPolicy, TcpMode
from forkypig.net.config import GATEWAY, GUEST, RESOLVER

SLOT_TABLE = "forky"
UPLINK, BRIDGE = "up0", "br0"  # a slot's two interfaces

# Where clouds tell a machine's secrets. Link-local as a whole: AWS, Azure, Google, OpenStack, DigitalOcean, Hetzner use
# 169.254.169.254, ECS 169.254.170.2, Scaleway 169.254.42.42, Tencent 169.254.0.23.
METADATA = tuple(
    IPv4Network(network)
    for network in (
        "169.254.0.0/16",
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure's WireServer
        "192.0.0.192/32",  # Oracle
        "192.80.8.124/32",  # Equinix Metal
    )
)

# A segment that belongs to no connection known here and begins none. «invalid» is what conntrack says of it when
# nf_conntrack_tcp_loose is 0 (slots have that); «new» would be what it says otherwise. With tcp_be_liberal, which slots
# have too, a known connection's segment out of window is not invalid.
_ORPHAN = "meta l4proto tcp ct state { new, invalid } tcp flags & (fin | syn | rst | ack) != syn"


def exceptions(policy: NetworkPolicy) -> list[IPv4Network]:
    """The networks of an egress list that lie within what is closed to everyone: named like that, they are meant."""
    return [network for network in policy.egress.allowed or () if any(network.subnet_of(closed) for closed in METADATA)]


def host_exceptions(policy: NetworkPolicy) -> list[IPv4Address]:
    """The single addresses of an egress list: one that is the host's own is meant."""
    return [network.network_address for network in policy.egress.allowed or () if network.prefixlen == 32]


def differ(one: NetworkPolicy, other: NetworkPolicy) -> bool:
    """Whether two policies have different rules in a slot (bandwidth is no rule)."""
    return (one.mode, one.egress, one.tcp) != (other.mode, other.egress, other.tcp)


def slot_rules(address: IPv4Address, subnet: IPv4Network, gateway: IPv4Address, policy: NetworkPolicy) -> str:
    """All rules of a slot. `gateway` is the host's bridge, where names are resolved."""
    chains = {
        "prerouting": (
            "type nat hook prerouting priority dstnat; policy accept;",
            [
                f"ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}",
                f"ip daddr {address} dnat ip to {GUEST}",
            ],
        ),
        "postrouting": (
            "type nat hook postrouting priority srcnat; policy accept;",
            [
                f'oifname "{UPLINK}" snat ip to {address}',
                # The machine speaks to itself by its outer address: without this the answer would come straight back.
                f'oifname "{BRIDGE}" ip saddr {GUEST} snat ip to {GATEWAY}',
            ],
        ),
        "orphan": ("", ["drop" if policy.tcp is TcpMode.SILENT else "reject with tcp reset"]),
        # An answer at once, so that programs don't hang.
        "refuse": ("", ["meta l4proto tcp reject with tcp reset", "reject with icmp admin-prohibited"]),
        "outward": ("", _outward(address, subnet, policy)),
        "inward": ("", _inward(subnet, policy)),
        "forward": ("type filter hook forward priority filter; policy drop;", _forward(policy)),
        "input": ("type filter hook input priority filter; policy drop;", _input(policy)),
    }
    # Without a packet coming in there is none going out. A netdev table, because inet ones don't see ARP.
    frames = {
        "from_uplink": (f'type filter hook ingress device "{UPLINK}" priority 0; policy accept;', _ingress(policy)),
        "from_machine": (f'type filter hook ingress device "{BRIDGE}" priority 0; policy accept;', _ingress(policy)),
    }
    return _script(f"inet {SLOT_TABLE}", [], chains) + _script(f"netdev {SLOT_TABLE}", [], frames)


def _ingress(policy: NetworkPolicy) -> list[str]:
    return ["drop"] if policy.mode is NetworkMode.NONE else []


def _input(policy: NetworkPolicy) -> list[str]:
    """For the slot itself: 10.0.2.2 and 10.0.2.3 are there to be pinged, and that is all."""
    if policy.mode is NetworkMode.NONE:
        return ["drop"]
    return [
        "meta nfproto ipv6 drop",
        "meta pkttype { broadcast, multicast } drop",
        f"{_ORPHAN} jump orphan",
        "icmp type echo-request accept",
        f'iifname "{BRIDGE}" goto refuse',
    ]


def _forward(policy: NetworkPolicy) -> list[str]:
    if policy.mode is NetworkMode.NONE:
        return ["drop"]
    return [
        "meta nfproto ipv6 drop",
        f"{_ORPHAN} jump orphan",
        "ct state invalid drop",
        f'iifname "{BRIDGE}" ct direction original ip saddr != {GUEST} drop',
        f'iifname "{BRIDGE}" ct direction original goto outward',
        f'iifname "{UPLINK}" ct direction reply goto outward',
        # To itself by its outer address: both directions come from and go to the machine.
        f'iifname "{BRIDGE}" oifname "{BRIDGE}" goto outward',
        f'iifname "{UPLINK}" ct direction original goto inward',
        f'iifname "{BRIDGE}" ct direction reply goto inward',
    ]


def _outward(address: IPv4Address, subnet: IPv4Network, policy: NetworkPolicy) -> list[str]:
    """Of connections that begin in the machine."""
    rules = [
        f"ct original ip daddr {address} accept",  # to itself
        f"ct original ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} ct original proto-dst 53 accept",
    ]
    if named := exceptions(policy):
        rules.append(f"ct original ip daddr {_set(named)} accept")
    rules.append(f"ct original ip daddr {_set(METADATA)} goto refuse")
    if policy.mode is NetworkMode.ISOLATED:
        rules.append(f"ct original ip daddr != {subnet} goto refuse")
    if policy.egress.allowed:
        rules.append(f"ct original ip daddr {_set(policy.egress.allowed)} accept")
    rules.append("accept" if policy.egress.allowed is None else "goto refuse")
    return rules


def _inward(subnet: IPv4Network, policy: NetworkPolicy) -> list[str]:
    """Of connections that begin elsewhere."""
    if policy.mode is NetworkMode.ISOLATED:
        return [f"ct original ip saddr != {subnet} goto refuse", "accept"]
    return ["accept"]


def host_rules(table: str, bridge: str, subnet: IPv4Network, gateway: IPv4Address) -> str:
    """All rules of an instance on the host, with the (empty) maps of published ports."""
    objects = [
        # «anywhere» is asked for every local address, «somewhere» for the one that was named.
        "map anywhere { type inet_proto . inet_service : ipv4_addr . inet_service; }",
        "map somewhere { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }",
        # machine . address of the host: an egress list named it
        "set excepted { type ipv4_addr . ipv4_addr; }",
    ]
    publish = [
        "meta l4proto { tcp, udp } dnat ip to ip daddr . meta l4proto . th dport map @somewhere",
        "meta l4proto { tcp, udp } fib daddr type local dnat ip to meta l4proto . th dport map @anywhere",
    ]
    ours, others = f'iifname "{bridge}"', f'iifname != "{bridge}" oifname "{bridge}"'
    chains = {
        # Before NAT, so that it is what the packet itself says: route_localnet is on at our bridge.
        "early": (
            "type filter hook prerouting priority raw; policy accept;",
            [f"{ours} ip daddr 127.0.0.0/8 drop", f"{ours} ip saddr 127.0.0.0/8 drop"],
        ),
        "prerouting": ("type nat hook prerouting priority dstnat; policy accept;", publish),
        "output": ("type nat hook output priority -100; policy accept;", publish),
        "postrouting": (
            "type nat hook postrouting priority srcnat; policy accept;",
            [
                f'oifname != "{bridge}" ip saddr {subnet} masquerade',
                # What comes back through our bridge must come to us: answers between two slots would go straight.
                f'oifname "{bridge}" ip saddr {subnet} ip saddr != {gateway} ct status dnat masquerade',
                f'oifname "{bridge}" fib saddr type local ip saddr != {gateway} masquerade',
            ],
        ),
        "forward": (
            "type filter hook forward priority filter; policy accept;",
            [
                f"{ours} meta nfproto ipv6 drop",
                f"{ours} ip saddr != {subnet} drop",
                # From outside only what was published: a neighbour may have set a route through us.
                f"{others} ct state established,related accept",
                f"{others} ct status dnat accept",
                f"{others} drop",
            ],
        ),
        "refuse": ("", ["meta l4proto tcp reject with tcp reset", "reject with icmpx admin-prohibited"]),
        "input": (
            "type filter hook input priority filter; policy accept;",
            [
                f'iifname != {{ "{bridge}", "lo" }} ip daddr {gateway} ct state new drop',
                f"{ours} jump machines",
            ],
        ),
        # From machines to the host itself. Answers to what the host began, names, ping; nothing else.
        "machines": (
            "",
            [
                "ct state established,related accept",
                "meta pkttype { broadcast, multicast } drop",
                "icmp type echo-request accept",
                f"ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept",
                "ip saddr . ip daddr @excepted accept",
                "goto refuse",
            ],
        ),
    }
    return _script(f"inet {table}", objects, chains)


def _script(table: str, objects: list[str], chains: dict[str, tuple[str, list[str]]]) -> str:
    lines = [f"add table {table}"]
    for text in objects:
        kind, name, definition = text.split(" ", 2)
        lines.append(f"add {kind} {table} {name} {definition}")
    for chain, (hook, _) in chains.items():
        lines.append(f"add chain {table} {chain} {{ {hook} }}" if hook else f"add chain {table} {chain}")
        lines.append(f"flush chain {table} {chain}")
    for chain, (_, rules) in chains.items():
        lines += [f"add rule {table} {chain} {rule}" for rule in rules]
    return "\n".join(lines) + "\n"


def _set(networks: "list[IPv4Network] | tuple[IPv4Network, ...]") -> str:
    """An anonymous set; overlapping networks are merged, which nft asks for."""
    return "{ " + ", ".join(str(network) for network in collapse_addresses(networks)) + " }"
