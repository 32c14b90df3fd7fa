"""The text of the rules under each policy. What they do to packets is tested with packets, in tests/component."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from forkypig.model.network import Egress, NetworkMode, NetworkPolicy, TcpMode
from forkypig.net.rules import differ, exceptions, host_exceptions, host_rules, slot_rules

ADDRESS, GATEWAY, SUBNET = IPv4Address("10.112.0.2"), IPv4Address("10.112.0.1"), IPv4Network("10.112.0.0/20")


def _rules(policy: NetworkPolicy, chain: str) -> list[str]:
    prefix = f" forky {chain} "
    lines = slot_rules(ADDRESS, SUBNET, GATEWAY, policy).splitlines()
    return [line.split(prefix)[1] for line in lines if line.startswith("add rule") and prefix in line]


def _egress(*texts: str) -> Egress:
    return Egress(tuple(IPv4Network(text) for text in texts))


def test_the_order_of_what_a_machine_may_begin() -> None:
    closed = "{ 100.100.100.200/32, 168.63.129.16/32, 169.254.0.0/16, 192.0.0.192/32, 192.80.8.124/32 }"
    begin = [
        "ct original ip daddr 10.112.0.2 accept",
        "ct original ip daddr 10.0.2.3 meta l4proto { tcp, udp } ct original proto-dst 53 accept",
    ]
    refuse = f"ct original ip daddr {closed} goto refuse"
    assert _rules(NetworkPolicy(), "outward") == [*begin, refuse, "accept"]
    assert _rules(NetworkPolicy(egress=Egress(())), "outward") == [*begin, refuse, "goto refuse"]
    assert _rules(NetworkPolicy(mode=NetworkMode.ISOLATED), "outward") == [
        *begin,
        refuse,
        "ct original ip daddr != 10.112.0.0/20 goto refuse",
        "accept",
    ]
    named = NetworkPolicy(egress=_egress("169.254.169.254/32", "192.0.2.0/25", "192.0.2.128/25"))
    assert _rules(named, "outward") == [
        *begin,
        "ct original ip daddr { 169.254.169.254/32 } accept",
        refuse,
        "ct original ip daddr { 169.254.169.254/32, 192.0.2.0/24 } accept",
        "goto refuse",
    ]


@pytest.mark.parametrize("mode", [NetworkMode.NAT, NetworkMode.ISOLATED])
def test_nothing_is_accepted_before_the_policy(mode: NetworkMode) -> None:
    """An «established: accept» would keep connections open that a new policy forbids."""
    forward = _rules(NetworkPolicy(mode=mode), "forward")
    assert forward
    assert not any(rule.endswith("accept") for rule in forward)


def test_none_drops_everything() -> None:
    none = NetworkPolicy(mode=NetworkMode.NONE)
    for chain in ("forward", "input", "from_uplink", "from_machine"):
        assert _rules(none, chain) == ["drop"]
        assert _rules(NetworkPolicy(), chain) != ["drop"]


def test_inherited_connections() -> None:
    assert _rules(NetworkPolicy(), "orphan") == ["reject with tcp reset"]
    assert _rules(NetworkPolicy(tcp=TcpMode.SILENT), "orphan") == ["drop"]


def test_only_what_is_named_exactly_is_excepted() -> None:
    wide = NetworkPolicy(egress=_egress("0.0.0.0/0", "169.0.0.0/8", "100.100.100.0/24"))
    assert exceptions(wide) == []
    assert host_exceptions(wide) == []
    exact = NetworkPolicy(egress=_egress("169.254.0.0/16", "169.254.169.254/32", "192.0.2.1/32"))
    assert exceptions(exact) == [IPv4Network("169.254.0.0/16"), IPv4Network("169.254.169.254/32")]
    assert host_exceptions(exact) == [IPv4Address("169.254.169.254"), IPv4Address("192.0.2.1")]
    assert exceptions(NetworkPolicy()) == host_exceptions(NetworkPolicy()) == []


def test_bandwidth_is_no_rule() -> None:
    assert not differ(NetworkPolicy(), NetworkPolicy(bandwidth_bytes_s=5))
    for other in (
        NetworkPolicy(mode=NetworkMode.NONE),
        NetworkPolicy(egress=Egress(())),
        NetworkPolicy(tcp=TcpMode.SILENT),
    ):
        assert differ(NetworkPolicy(), other)


def test_rules_can_be_said_again() -> None:
    """Everything that is added is flushed before its rules, so that saying it twice is the same as once."""
    for text in (slot_rules(ADDRESS, SUBNET, GATEWAY, NetworkPolicy()), host_rules("t", "b", SUBNET, GATEWAY)):
        lines = text.splitlines()
        chains = {" ".join(line.split()[2:5]) for line in lines if line.startswith("add chain")}
        flushed = {" ".join(line.split()[2:5]) for line in lines if line.startswith("flush chain")}
        ruled = {" ".join(line.split()[2:5]) for line in lines if line.startswith("add rule")}
        assert ruled <= chains == flushed
        assert not any(line.startswith(("delete", "flush table", "flush ruleset", "flush map")) for line in lines)
