"""The host's own services that single machines may reach: an egress list named the very address."""

from ipaddress import IPv4Address

from forkypig.net import nftables


def except_on_host(table: str, machine: IPv4Address, hosts: list[IPv4Address]) -> None:
    """Lets a machine reach exactly these addresses of the host. Runs in the host's namespace."""
    lines = [
        f"delete element inet {table} excepted {{ {machine} . {there} }}"
        for there in excepted(table).get(machine, ())
        if there not in hosts
    ]
    lines += [f"add element inet {table} excepted {{ {machine} . {host} }}" for host in hosts]
    if lines:
        nftables.load("\n".join(lines) + "\n")


def excepted(table: str) -> dict[IPv4Address, list[IPv4Address]]:
    """What is excepted now: machine -> addresses of the host."""
    result: dict[IPv4Address, list[IPv4Address]] = {}
    for element in nftables.elements("set", table, "excepted"):
        machine, host = element["concat"]
        result.setdefault(IPv4Address(machine), []).append(IPv4Address(host))
    return result
