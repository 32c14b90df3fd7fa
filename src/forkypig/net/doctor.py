"""What a host lacks for machines to have networks of their own. Tried, in a namespace that ends with the try."""

import os
import shutil
import threading
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from forkypig.errors import ForkyError
from forkypig.model.network import NetworkPolicy
from forkypig.net import links, namespace, nftables, rules
from forkypig.net.config import GATEWAY_MAC
from forkypig.net.netlink import NetlinkSocket
from forkypig.net.tap import open_tap


def missing() -> list[str]:
    """What is missing, each as a sentence that says what to do; empty: all is there. Blocks for 50 ms."""
    if os.geteuid() != 0:
        return ["networks of their own need root: run as root, or use user-mode networking"]
    found = []
    if shutil.which("nft") is None:
        found.append(nftables.MISSING)
    if not Path("/dev/net/tun").exists():
        found.append("there is no /dev/net/tun: load the kernel's module tun, or use user-mode networking")
    if not found:
        # A thread of its own: this one may be an event loop's, which never enters another namespace.
        trial = threading.Thread(target=lambda: found.extend(_try_out()), name="net-trial")
        trial.start()
        trial.join()
    return found


def _try_out() -> list[str]:
    try:
        with namespace.scratch():
            return _try_interfaces() or _try_rules()
    except OSError as error:
        return [f"a network namespace can't be made: {error.strerror}"]


def _try_interfaces() -> list[str]:
    try:
        with NetlinkSocket() as netlink:
            netlink.request(
                links.add_bridge(rules.BRIDGE, mac=GATEWAY_MAC, mtu=1500),
                links.add_cable(rules.UPLINK, far_name="far0", far_mac=b"\x52\x56\0\0\0\1", mtu=1500),
            )
    except OSError as error:
        return [f"the kernel can't make a bridge or a veth pair: {error.strerror}: load its modules bridge and veth"]
    try:
        os.close(open_tap().fd)
    except OSError as error:
        return [f"no tap can be made: {error.strerror}"]
    return []


def _try_rules() -> list[str]:
    subnet, gateway, address = IPv4Network("10.112.0.0/20"), IPv4Address("10.112.0.1"), IPv4Address("10.112.0.2")
    try:
        nftables.load(rules.slot_rules(address, subnet, gateway, NetworkPolicy()))
        nftables.load(rules.host_rules("forky-try", rules.BRIDGE, subnet, gateway))
    except ForkyError as error:
        return [f"nftables can't hold our rules: {error}"]
    return []
