"""Where the controller is and as whom it is called: from arguments, or FORKY_CONTROLLER, FORKY_TOKEN, FORKY_CA,
FORKY_CERTIFICATE, FORKY_CERTIFICATE_KEY, FORKY_TENANT."""

import os
from dataclasses import dataclass
from pathlib import Path

from forkypig.errors import InvalidRequest, Unauthenticated
from forkypig.model import check_name
from forkypig.model.listening import HostPort, parse_host_port

# A token has 59; a larger one would only be refused by gRPC, in words that nobody understands.
_LONGEST_TOKEN = 1024


@dataclass(frozen=True, slots=True)
class Remote:
    """A controller at an address of the network."""

    at: HostPort
    tls: bool
    ca: Path | None = None  # None: the authorities that this computer believes
    certificate: Path | None = None
    key: Path | None = None

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.at}"


# A Unix socket of this computer, or an address.
Endpoint = Path | Remote


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom calls are made, as far as calls say it themselves."""

    token: str = ""
    tenant: str = ""  # that the operator acts in

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        pairs = (("authorization", f"Bearer {self.token}" if self.token else ""), ("forky-tenant", self.tenant))
        return tuple((key, value) for key, value in pairs if value)


def identity(token: str | None, tenant: str | None) -> Identity:
    """None: of the environment. Raises Unauthenticated for what can't be a token, InvalidRequest for a tenant."""
    token = os.environ.get("FORKY_TOKEN", "") if token is None else token
    tenant = os.environ.get("FORKY_TENANT", "") if tenant is None else tenant
    if len(token) > _LONGEST_TOKEN or not token.isascii() or not token.isprintable():
        raise Unauthenticated
    if tenant:
        check_name("tenant", tenant)
    return Identity(token.strip(), tenant)


def endpoint(
    controller: str, ca: str | Path | None, certificate: str | Path | None = None, key: str | Path | None = None
) -> Endpoint:
    """`controller`: HOST:PORT or https://HOST:PORT, with TLS; http://HOST:PORT, on loopback alone; unix:/PATH. `ca` and
    the others are PEM files; None: of the environment. Raises InvalidRequest."""
    if controller.startswith("unix:"):
        return Path(controller.removeprefix("unix:").replace("///", "/", 1))
    scheme, separator, rest = controller.partition("://")
    if separator and scheme not in ("https", "http"):
        raise InvalidRequest(f"FORKY_CONTROLLER «{controller[:80]}»: write HOST:PORT, https://HOST:PORT or unix:/PATH")
    at = parse_host_port("FORKY_CONTROLLER", (rest if separator else controller).rstrip("/"))
    if separator and scheme == "http":
        if not at.on_loopback:
            raise InvalidRequest(f"{controller}: a token would go over the network for all to read; use https://{at}")
        return Remote(at, tls=False)
    shown, secret = _file(certificate, "FORKY_CERTIFICATE"), _file(key, "FORKY_CERTIFICATE_KEY")
    if (shown is None) != (secret is None):
        raise InvalidRequest("a client certificate needs its key: set both FORKY_CERTIFICATE and FORKY_CERTIFICATE_KEY")
    return Remote(at, tls=True, ca=_file(ca, "FORKY_CA"), certificate=shown, key=secret)


def _file(given: str | Path | None, variable: str) -> Path | None:
    text = os.environ.get(variable, "") if given is None else str(given)
    if not text:
        return None
    path = Path(text).absolute()
    if not path.is_file():
        raise InvalidRequest(f"{variable} names {path}, which is no file: it is to be a PEM file")
    return path
