"""Settings of the network: what is refused, which subnet is chosen, and names that lead back to what they name."""

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, ResourceExhausted
from forkypig.net.config import Claim, NetworkConfig, capacity, choose_subnet, link_mac, slot_address


def _config(**changes: object) -> NetworkConfig:
    values: dict[str, object] = {
        "instance": "0a1b2c3d",
        "bridge": "fk-0a1b2c3d",
        "subnet": None,
        "mtu": 1500,
        "nameservers": (),
        "state": Path("state"),
    }
    return NetworkConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"instance": "A/b"}, "instance"),
        ({"instance": ""}, "instance"),
        ({"bridge": "sixteen-letters-"}, "FORKY_BRIDGE"),
        ({"bridge": "ééééééééé"}, "FORKY_BRIDGE"),
        ({"bridge": ""}, "FORKY_BRIDGE"),
        ({"bridge": "a b"}, "FORKY_BRIDGE"),
        ({"bridge": "../x"}, "FORKY_BRIDGE"),
        ({"mtu": 1279}, "FORKY_MTU"),
        ({"mtu": 65522}, "FORKY_MTU"),
        ({"subnet": IPv4Network("192.0.2.0/30")}, r"192\.0\.2\.0/30 is too small: /29 at least \(FORKY_SUBNET"),
        ({"subnet": IPv4Network("10.0.0.0/8")}, r"overlaps 10\.0\.2\.0/24.*FORKY_SUBNET"),
        ({"subnet": IPv4Network("127.0.0.0/16")}, "FORKY_SUBNET"),
        ({"subnet": IPv4Network("224.1.0.0/16")}, "FORKY_SUBNET"),
        ({"subnet": IPv4Network("169.254.3.0/24")}, "FORKY_SUBNET"),
    ],
)
def test_what_can_not_be(changes: dict[str, object], complaint: str) -> None:
    _config().check()
    with pytest.raises(InvalidRequest, match=complaint):
        _config(**changes).check()


def test_what_can_be() -> None:
    for changes in ({"mtu": 1280}, {"mtu": 65521}, {"bridge": "a" * 15}, {"subnet": IPv4Network("192.0.2.0/29")}):
        _config(**changes).check()


def _claims(*networks: str) -> list[Claim]:
    return [Claim(IPv4Network(network), f"a route to {network}") for network in networks]


def test_the_first_free_subnet() -> None:
    assert choose_subnet(None, []) == IPv4Network("10.112.0.0/20")
    # neither the default route nor the two halves that a VPN writes for it count
    assert choose_subnet(None, _claims("0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1")) == IPv4Network("10.112.0.0/20")
    assert choose_subnet(None, _claims("10.112.15.255/32", "10.112.16.0/21")) == IPv4Network("10.112.32.0/20")
    with pytest.raises(ResourceExhausted, match="FORKY_SUBNET"):
        choose_subnet(None, _claims("10.0.0.0/8"))


def test_a_wanted_subnet() -> None:
    wanted = IPv4Network("192.0.2.0/24")
    assert choose_subnet(wanted, _claims("192.0.3.0/24", "0.0.0.0/0")) == wanted
    for taken in ("192.0.2.128/25", "192.0.0.0/16", "192.0.2.7/32"):
        with pytest.raises(InvalidRequest, match=rf"192\.0\.2\.0/24 overlaps {taken}, which a route to {taken} has"):
            choose_subnet(wanted, _claims(taken))


def test_how_many_fit() -> None:
    assert capacity(IPv4Network("192.0.2.0/29")) == 5
    assert capacity(IPv4Network("192.0.2.0/24")) == 253
    assert capacity(IPv4Network("10.112.0.0/20")) == 1023  # a bridge has no more ports
    subnet = IPv4Network("192.0.2.0/29")
    addresses = [slot_address(subnet, index) for index in range(capacity(subnet))]
    assert addresses[0] == IPv4Address("192.0.2.2")
    assert addresses[-1] == IPv4Address("192.0.2.6")  # .7 is the broadcast
    assert len({link_mac(address) for address in addresses}) == 5
    assert all(mac[0] & 3 == 2 for mac in map(link_mac, addresses))  # ours to give, and no group


def test_names_lead_back() -> None:
    config, longer = _config(), _config(instance="0a1b2c3d-1")
    for index in (0, 7, 1022):
        assert config.slot_index(config.slot_name(index)) == index
        assert config.link_index(config.link_name(index)) == index
        assert len(config.link_name(index)) <= 15
        assert longer.slot_index(config.slot_name(index)) is None
        assert config.slot_index(longer.slot_name(index)) is None
        assert config.link_index(longer.link_name(index)) is None
    for stranger in ("forky-0a1b2c3d-", "forky-0a1b2c3d-x", "x-forky-0a1b2c3d-1", "eth0", "", "forky-0a1b2c3d-1/../x"):
        assert config.slot_index(stranger) is None
        assert config.link_index(stranger) is None
