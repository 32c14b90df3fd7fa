"""/metrics by HTTP, for Prometheus: for whoever brings a token of the role «metrics», and off loopback with TLS alone.

Metrics name the machines of every tenant, and each user of a computer reaches its loopback: so a token it is.
"""

import asyncio
import contextlib
import socket
import socketserver
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from forkypig.certificates.tls import Tls, of_authority
from forkypig.controller.audit import entry_of
from forkypig.controller.auth import roles
from forkypig.controller.edge.access import Access
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError, InvalidRequest, NotPossibleNow, TooManyRequests
from forkypig.model.listening import HostPort, parse_host_port
from forkypig.wire.status import STATUS

_ASKED_S = 10.0  # as long as Prometheus waits for a scrape by default
_MOST_S = 2 * _ASKED_S  # for all of one connection
_MOST_AT_ONCE = 100  # connections, each of which has a thread: not all of somebody who opens thousands
_REFUSALS = {"UNAUTHENTICATED": "401 Unauthorized", "PERMISSION_DENIED": "403 Forbidden"}
log = structlog.get_logger()


@contextlib.asynccontextmanager
async def serving(settings: Settings, registry: CollectorRegistry, access: Access) -> AsyncIterator[None]:
    """Serves /metrics where settings.metrics says, for as long as the block lasts. Raises InvalidRequest for what is
    not safe, NotPossibleNow for what can't be had."""
    if not settings.metrics:
        yield
        return
    at = parse_host_port("FORKY_METRICS", settings.metrics)
    tls = of_authority(settings.auth)
    if tls is None and not at.on_loopback:
        raise InvalidRequest(
            f"FORKY_METRICS is {at}, which others can reach, and there is no certificate: make one with `forky auth "
            f"init`, or use 127.0.0.1:{at.port}"
        )
    try:
        server = _Server(at, tls, _Door(access, registry))
    except OSError as error:
        raise NotPossibleNow(
            f"metrics can't be served at FORKY_METRICS={at} ({error.strerror}): choose another address"
        ) from error
    log.info("metrics", address=str(at), tls=tls is not None)
    serving = asyncio.create_task(asyncio.to_thread(server.serve_forever))
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)  # a scrape that is under way waits for the loop
        await serving
        server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = _ASKED_S  # for each read, those of the TLS handshake too: who opens a connection and says nothing is left

    def log_message(self, format: str, *args: object) -> None:
        """No line for each scrape."""


class _Server(ThreadingWSGIServer):
    request_queue_size = 128  # with its parents' 5 a scrape would wait a second when a few come at once

    def __init__(self, at: HostPort, tls: Tls | None, application: Callable[..., Iterable[bytes]]) -> None:
        """Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
        self._tls, self._free = tls, threading.BoundedSemaphore(_MOST_AT_ONCE)
        self._began_s: dict[socket.socket, float] = {}  # of those that are served
        super().__init__((at.host, at.port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """As its parents do it, but for the name of the host, which they ask DNS for."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake is for the connection's own thread: whoever is slow holds up nobody else.
            connection = self._tls.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            self._began_s[request] = time.monotonic()
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: ends what sends a byte now and then, which no timeout of a read ends, or reads as slowly."""
        for request, began_s in list(self._began_s.items()):
            if time.monotonic() - began_s > _MOST_S:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(request, socket.SHUT_RDWR)  # not TLS's, which waits for the other side

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._began_s.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a connection that broke off, or speaks no TLS; no traceback."""
        log.debug("no scrape", peer=str(client_address), error=str(sys.exception()))


class _Door:
    """A WSGI application: metrics, for who may see them. Called on threads of its own."""

    def __init__(self, access: Access, registry: CollectorRegistry) -> None:
        self._access, self._loop = access, asyncio.get_running_loop()
        self._metrics: Any = make_wsgi_app(registry)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asking = self._refusal(environ.get("HTTP_AUTHORIZATION", ""), environ.get("REMOTE_ADDR", ""))
        refusal = asyncio.run_coroutine_threadsafe(asking, self._loop).result(_ASKED_S)
        if refusal is None:
            found: Iterable[bytes] = self._metrics(environ, start)
            return found
        code = _REFUSALS.get(STATUS[type(refusal)].name, "503 Service Unavailable")
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        if code.startswith("401"):
            headers.append(("WWW-Authenticate", "Bearer"))
        if isinstance(refusal, TooManyRequests):
            code = "429 Too Many Requests"
            headers.append(("Retry-After", str(int(refusal.retry_after_s) + 1)))
        start(code, headers)
        return [f"{refusal}\n".encode()]

    async def _refusal(self, authorization: str, address: str) -> ForkyError | None:
        """Why they may not; it is in the audit log then."""
        began_s, peer, who = time.monotonic(), _peer(address), None
        try:
            who = await self._access.gate.who({"authorization": authorization}, peer)
            roles.check_may(who, roles.METRICS)
        except ForkyError as error:
            result = STATUS[type(error)].name
            self._access.audit.write(entry_of(who, roles.METRICS, result, began_s=began_s, peer=peer))
            return error
        return None


def _peer(address: str) -> str:
    """As gRPC has it."""
    return f"ipv6:[{address}]:0" if ":" in address else f"ipv4:{address}:0"
