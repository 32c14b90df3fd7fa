"""Where the REST API listens, and what that takes: off loopback only with TLS, and on TCP only callers with a token.

A Unix socket is 0600 in a 0700 directory, so whoever reaches it may do all that this process may. A TCP port is reached
by every user of this host, and the controller takes us for its own user: so a token must come with every call, and the
controller must be one that checks it. That is asked before the first port is opened.
"""

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from forkypig import errors
from forkypig.certificates.tls import Tls, of_authority
from forkypig.daemon.settings import Settings
from forkypig.sdk.connection import QUICK_S, calls, open_channel
from forkypig.v1 import controller_pb2, controller_pb2_grpc

_BACKLOG = 1024
_NOBODYS_TOKEN = "fp_this-is-nobodys-token"  # noqa: S105 - that is the point


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket's `path`, or `host` and `port`."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "Address":
        """From FORKY_REST. Raises InvalidRequest."""
        text = settings.rest
        if text in ("", "unix"):
            return cls(path=settings.socket("rest"))
        if text.startswith("/"):
            return cls(path=Path(text))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdecimal() or not 0 <= int(port) <= 65535:
            raise errors.InvalidRequest(
                f"FORKY_REST=«{text}» is no address: write HOST:PORT, an absolute path of a Unix socket, or unix"
            )
        return cls(host=host, port=int(port))

    @property
    def is_tcp(self) -> bool:
        return self.path is None

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name: it may mean anything

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"{self.host}:{self.port}"


def tls(settings: Settings, address: Address) -> Tls | None:
    """How an address is served: with the certificate that FORKY_REST_CERTIFICATE names, else with that of `forky auth
    init`; None: without TLS. Raises InvalidRequest where there must be TLS."""
    certificate, key = settings.rest_certificate, settings.rest_key
    if bool(certificate) != bool(key):
        raise errors.InvalidRequest("FORKY_REST_CERTIFICATE and FORKY_REST_KEY go together: set both or none")
    if not address.is_tcp:
        return None
    if certificate:
        return Tls(Path(certificate), Path(key))
    if (own := of_authority(settings.auth)) is not None:
        return own
    if not address.is_loopback:
        raise errors.InvalidRequest(
            f"the REST API does not listen on {address} without TLS: make a certificate with `forky auth init`, set "
            "FORKY_REST_CERTIFICATE and FORKY_REST_KEY to one of your own, or use 127.0.0.1"
        )
    return None


async def check_tokens_count(controller: Path) -> None:
    """Raises NotPossibleNow where the controller behind this socket lets in whoever has a token of nobody's."""
    async with open_channel(controller) as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        credentials = (("authorization", f"Bearer {_NOBODYS_TOKEN}"),)
        with calls(controller):
            try:
                await stub.ListMachines(
                    controller_pb2.ListMachinesRequest(page_size=1), metadata=credentials, timeout=QUICK_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    return
                raise
    raise errors.NotPossibleNow(
        "the REST API does not open a TCP port, since this controller does not check tokens: use a Unix socket "
        "(FORKY_REST=unix)"
    )


@contextlib.contextmanager
def bound(address: Address) -> Iterator[socket.socket]:
    """The listening socket; that of a path is there for its owner alone, and gone at the end. The caller holds the pid
    file of this home, so a socket that was left behind may be replaced. Raises NotPossibleNow."""
    listener: socket.socket | None = None
    try:
        if address.path is None:
            kind = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            listener = socket.create_server((address.host, address.port), family=kind, backlog=_BACKLOG)
        else:
            if address.path.exists() and not stat.S_ISSOCK(address.path.lstat().st_mode):
                raise errors.NotPossibleNow(f"{address.path} is there and no socket: name another path in FORKY_REST")
            address.path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            old = os.umask(0o177)
            try:
                listener.bind(str(address.path))
            finally:
                os.umask(old)
            listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise errors.NotPossibleNow(f"the REST API can't listen on {address}: {error.strerror or error}") from error
    try:
        yield listener
    finally:
        listener.close()
        if address.path is not None:
            address.path.unlink(missing_ok=True)
