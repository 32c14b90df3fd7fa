"""Addresses of the controller: HOST:PORT, and what can be said of a host without asking anybody."""

import ipaddress
from dataclasses import dataclass

from forkypig.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class HostPort:
    """Where to listen, or to connect to."""

    host: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this computer can be meant."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(what: str, text: str) -> HostPort:
    """`text` is HOST:PORT or [IPV6]:PORT. Raises InvalidRequest, naming `what`."""
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    in_brackets = host.startswith("[") and host.endswith("]")
    fit = colon and bare and (":" not in bare or in_brackets) and port.isascii() and port.isdigit()
    if not fit or not 0 <= int(port[:6]) < 65536 or any(c.isspace() or c in "/@" for c in bare):
        raise InvalidRequest(f"{what} is HOST:PORT, as in 127.0.0.1:7070 or [::1]:7070, and not «{text[:80]}»")
    return HostPort(bare, int(port))
