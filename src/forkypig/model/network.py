"""How a machine is connected: its mode, what it may reach, its published ports. Standard library only."""

import re
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network

from forkypig.errors import InvalidRequest


class NetworkMode(Enum):
    """What a machine is connected to."""

    NAT = "nat"  # the outside through the host's address, other machines, and whoever reaches it
    ISOLATED = "isolated"  # other machines of its host and the host itself; nothing outside
    NONE = "none"  # no packet gets in or out


class TcpMode(Enum):
    """What becomes of the TCP connections that a child inherits from its parent."""

    RESET = "reset"  # both the program and what it sends meet an RST at once
    SILENT = "silent"  # they look alive and nothing ever comes


@dataclass(frozen=True, slots=True)
class Egress:
    """Where connections that begin in a machine may go. Answers always may."""

    allowed: tuple[IPv4Network, ...] | None = None  # None: anywhere; empty: nowhere

    @classmethod
    def parse(cls, text: str) -> "Egress":
        """From "allow", "deny" or "CIDR,…"; raises InvalidRequest."""
        if text == "allow":
            return cls()
        if text == "deny":
            return cls(())
        try:
            return cls(tuple(IPv4Network(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise InvalidRequest(
                f"egress «{text}» is not possible ({error}): use allow, deny, or networks like 10.0.0.0/8,1.2.3.4/32"
            ) from error

    @property
    def denied(self) -> bool:
        """Whether it may go nowhere at all."""
        return self.allowed == ()

    def __str__(self) -> str:
        if self.allowed is None:
            return "allow"
        return ",".join(str(network) for network in self.allowed) or "deny"


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What is enforced around one machine; changeable while it runs."""

    mode: NetworkMode = NetworkMode.NAT
    egress: Egress = Egress()
    bandwidth_bytes_s: int | None = None  # in each direction; None: no limit
    tcp: TcpMode = TcpMode.RESET


@dataclass(frozen=True, slots=True)
class PortForward:
    """A port of the host that leads to one of a machine."""

    host_port: int
    guest_port: int
    protocol: str = "tcp"  # or "udp"
    host_address: str = "0.0.0.0"  # noqa: S104  a published port is for everyone unless an address is named

    @classmethod
    def parse(cls, text: str) -> "PortForward":
        """From "[ADDRESS:]HOST:GUEST[/udp]"; raises InvalidRequest."""
        found = re.fullmatch(r"(?:([0-9.]+):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?", text)
        try:
            if found is None:
                raise ValueError
            address, host, guest, protocol = found.groups()
            ports = int(host), int(guest)
            if not all(1 <= port <= 65535 for port in ports):
                raise ValueError
            return cls(*ports, protocol or "tcp", str(IPv4Address(address or "0.0.0.0")))  # noqa: S104
        except ValueError as error:
            raise InvalidRequest(
                f"«{text}» does not publish a port: write HOST:GUEST, like 8080:80, 127.0.0.1:8080:80 or 5353:53/udp"
            ) from error

    @property
    def host_side(self) -> tuple[str, int, str]:
        """What no two of them may have in common: address, port, protocol."""
        return self.host_address, self.host_port, self.protocol

    def __str__(self) -> str:
        prefix = "" if self.host_address == "0.0.0.0" else f"{self.host_address}:"  # noqa: S104
        return f"{prefix}{self.host_port}:{self.guest_port}" + ("" if self.protocol == "tcp" else f"/{self.protocol}")
