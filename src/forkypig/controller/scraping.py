"""/metrics by HTTP, for Prometheus: on loopback, for whoever brings a token of the role «metrics».

Metrics name the machines of every tenant, and each user of a computer reaches its loopback: so a token it is. Off
loopback the REST API has them at /v1/metrics, with TLS.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from forkypig.controller import roles
from forkypig.controller.access import Access
from forkypig.daemon.addresses import loopback
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, NotPossibleNow, TooManyRequests
from forkypig.model.access import AuditEntry, Principal
from forkypig.wire.status import STATUS

_ASKED_S = 10.0  # as long as Prometheus waits for a scrape by default
_REFUSALS = {"UNAUTHENTICATED": "401 Unauthorized", "PERMISSION_DENIED": "403 Forbidden"}
_METHOD = roles.METRICS.removeprefix("/forkypig.v1.")


@contextlib.asynccontextmanager
async def serving(where: str, registry: CollectorRegistry, access: Access) -> AsyncIterator[None]:
    """Serves /metrics for as long as the block lasts; "" serves nothing. Raises NotPossibleNow."""
    if not where:
        yield
        return
    host, port = loopback(where)
    try:
        server = make_server(host, port, _Door(access, registry), ThreadingWSGIServer, _Silent)
    except OSError as error:
        raise NotPossibleNow(
            f"metrics can't be served at FORKY_METRICS={where} ({error.strerror}): choose another port"
        ) from error
    serving = asyncio.create_task(asyncio.to_thread(server.serve_forever))
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)  # a scrape that is under way waits for the loop
        await serving
        server.server_close()


class _Silent(WSGIRequestHandler):
    """Writes no line for each scrape."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


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
        began_s, peer, who = time.monotonic(), f"ipv4:{address}:0", None
        try:
            who = await self._access.gate.who({"authorization": authorization}, peer)
            roles.check_may(who, roles.METRICS)
        except ForkyError as error:
            self._access.audit.write(_line(who, STATUS[type(error)].name, began_s, peer))
            return error
        return None


def _line(who: Principal | None, result: str, began_s: float, peer: str) -> AuditEntry:
    return AuditEntry(
        time_us=now_us(),
        who=who.name if who else "",
        tenant=who.tenant if who else "",
        role=who.role.value if who else "",
        method=_METHOD,
        about="",
        result=result,
        duration_ms=round((time.monotonic() - began_s) * 1000, 1),
        peer=peer,
    )
