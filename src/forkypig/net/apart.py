"""Keeps the machines of different tenants apart on the bridge that all slots hang on.

A frame between two slots passes the bridge's forward hook (family «bridge»), where its sender's address says the
tenant: a slot puts its own address on all that leaves it, so a guest can't lie. What is for another tenant's machine is
dropped, questions by ARP too: its address looks like one that nobody has. Machines of the default tenant are in no set,
so that an instance with one tenant has no table and pays nothing.

Tenants are numbers here, given anew by each hostd: the whole table is then said again in one transaction.
"""

import asyncio
from collections.abc import Mapping
from ipaddress import IPv4Address

import structlog

from forkypig.errors import InternalError, NotPossibleNow
from forkypig.model.access import DEFAULT_TENANT
from forkypig.net import nftables

log = structlog.get_logger()

_OBJECTS = (
    "map {table} tenant_of {{ type ipv4_addr : mark; }}",
    "set {table} members {{ type ipv4_addr . mark; }}",  # address . tenant: who may be sent to by whom
    "set {table} named {{ type ipv4_addr; }}",  # of every tenant but the default one
)


def rules(table: str, ports: str, members: Mapping[IPv4Address, int]) -> str:
    """The whole table. `ports`: what the names of the bridge's ports begin with; `members`: address -> number."""
    table = f"bridge {table}"
    chain = [
        f'iifname != "{ports}*" accept',
        "meta mark set 0",
        "meta mark set ip saddr map @tenant_of",
        "meta mark set arp saddr ip map @tenant_of",
        "meta mark 0 ip daddr != @named accept",
        "meta mark 0 arp daddr ip != @named accept",
        "ip daddr . meta mark @members accept",
        "arp daddr ip . meta mark @members accept",
        "drop",
    ]
    lines = [f"add table {table}", *(f"add {text.format(table=table)}" for text in _OBJECTS)]
    lines += [f"flush {text.split()[0]} {table} {text.split()[2]}" for text in _OBJECTS]
    lines += [
        f"add chain {table} apart {{ type filter hook forward priority 0; policy accept; }}",
        f"flush chain {table} apart",
        *(f"add rule {table} apart {rule}" for rule in chain),
    ]
    lines += [line for address, number in members.items() for line in _element("add", table, address, number)]
    return "\n".join(lines) + "\n"


def _element(verb: str, table: str, address: IPv4Address, number: int) -> list[str]:
    return [
        f"{verb} element {table} tenant_of {{ {address} : {number} }}",
        f"{verb} element {table} members {{ {address} . {number} }}",
        f"{verb} element {table} named {{ {address} }}",
    ]


class Apart:
    """Who is of which tenant, in the kernel."""

    def __init__(self, table: str, ports: str) -> None:
        """As `rules`."""
        self._table, self._ports = table, ports
        self._numbers: dict[str, int] = {}
        self._members: dict[IPv4Address, int] = {}
        self._there = False  # the table is, as we made it
        self._changing = asyncio.Lock()

    def _number(self, tenant: str) -> int:
        return self._numbers.setdefault(tenant, len(self._numbers) + 1)

    async def all_are(self, tenants: Mapping[IPv4Address, str]) -> None:
        """These are all machines there are, of a hostd that was here before; in one transaction."""
        async with self._changing:
            members = {a: self._number(tenant) for a, tenant in tenants.items() if tenant != DEFAULT_TENANT}
            if members:
                await self._load(rules(self._table, self._ports, members))
                self._there = True
            else:
                await asyncio.to_thread(remove, self._table)
                self._there = False
            self._members = members

    async def join(self, address: IPv4Address, tenant: str) -> None:
        """The machine at this address is the tenant's, whosever it was before. Before it runs.

        Raises NotPossibleNow where the host's kernel can't keep it apart from others."""
        async with self._changing:
            number = self._number(tenant) if tenant != DEFAULT_TENANT else None
            before = self._members.get(address)
            if before == number:
                return
            changed = {a: n for a, n in self._members.items() if a != address}
            if number is not None:
                changed[address] = number
            if self._there:
                table = f"bridge {self._table}"
                lines = _element("delete", table, address, before) if before is not None else []
                lines += _element("add", table, address, number) if number is not None else []
                await self._load("\n".join(lines) + "\n")
            else:
                await self._load(rules(self._table, self._ports, changed))
                self._there = True
            self._members = changed

    async def _load(self, text: str) -> None:
        try:
            await asyncio.to_thread(nftables.load, text)
        except InternalError as error:
            log.error("tenants can't be kept apart", error=str(error))
            raise NotPossibleNow(
                "this host's kernel can't keep the networks of tenants apart (nftables for bridges, nf_tables and "
                "bridge): load those modules, or give the machine no network (--network none)"
            ) from error


def remove(table: str) -> None:
    """Nothing of it is left. Synchronous; one that is not there is fine."""
    if f"bridge {table}" in nftables.tables():
        nftables.load(f"delete table bridge {table}\n")
