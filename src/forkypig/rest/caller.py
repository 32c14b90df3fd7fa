"""Whoever calls: their credentials and idempotency key, taken from the HTTP headers and put on each gRPC call.

A context variable, so that everything that a request does is done as its caller.
"""

import ipaddress
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import grpc
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from forkypig import errors
from forkypig.rest.problems import problem

Metadata = tuple[tuple[str, str], ...]

_current: ContextVar[Metadata] = ContextVar("caller", default=())
# Headers that become metadata of the same name. A value is what gRPC can carry: printable ASCII.
_PASSED_ON = ("authorization", "idempotency-key", "forky-tenant")
_TRACE = ("traceparent", "tracestate")  # W3C's; what is odd in them is nobody's mistake but goes no further
_KEY = "idempotency-key"
# Beginnings of the names of methods that change nothing.
_LOOKING = ("Get", "List", "Read", "Stat", "Download", "Doctor", "Diff", "Check", "Follow", "WhoAmI")
_VALUE = re.compile(r"[\x20-\x7e]{1,4096}")
_OPEN_PATHS = frozenset({"/v1/health", "/v1/openapi.json"})


class AsCaller:
    """ASGI middleware: sets who calls. With `token_needed` whoever brings no bearer token is turned away here."""

    def __init__(self, app: ASGIApp, token_needed: bool) -> None:
        self._app, self._token_needed = app, token_needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope["path"], headers)
        if refused is not None:
            await refused(scope, receive, send)
            return
        passed = tuple((name, value) for name in _PASSED_ON if (value := headers.get(name)) is not None)
        trace = ((name, ",".join(headers.getlist(name))) for name in _TRACE)
        passed = (*passed, *(pair for pair in trace if _VALUE.fullmatch(pair[1])), *_peer(scope))
        token = _current.set(passed)
        try:
            await self._app(scope, receive, send)
        finally:
            _current.reset(token)

    def _refused(self, path: str, headers: Headers) -> ASGIApp | None:
        for name in _PASSED_ON:
            values = headers.getlist(name)
            if len(values) > 1 or not all(_VALUE.fullmatch(value) for value in values):
                error = errors.InvalidRequest(f"the header {name} is not one line of at most 4096 printable characters")
                return problem(error)
        if self._token_needed and path not in _OPEN_PATHS:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                return problem(
                    "this address takes calls with a token only: send it as «Authorization: Bearer fp_…»",
                    status=401,
                    kind="unauthenticated",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None


def _peer(scope: Scope) -> Metadata:
    """Where the caller is, as gRPC would name it: for the audit log, and the count of log-ins that failed."""
    host, port = scope.get("client") or ("", 0)
    if not host:
        return ()  # a Unix socket has none
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:  # a proxy has said «unknown», say: that must not keep log-ins from being counted
        host, port, version = "0.0.0.0", 0, 4  # noqa: S104 - not to listen on
    return (("forky-peer", f"ipv6:[{host}]:{port}" if version == 6 else f"ipv4:{host}:{port}"),)


class CallerChannel:
    """A channel whose calls carry the caller's metadata. Of a channel it has what generated stubs use, and close()."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return _carrying(method, self._channel.unary_unary(method, *arguments, **options))

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return _carrying(method, self._channel.unary_stream(method, *arguments, **options))

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return _carrying(method, self._channel.stream_unary(method, *arguments, **options))

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return _carrying(method, self._channel.stream_stream(method, *arguments, **options))


def _carrying(path: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of this path ("/forkypig.v1.Controller/Fork"), which carries what the caller sent; that goes before
    what the SDK would send of its own."""
    looks = path.rpartition("/")[2].startswith(_LOOKING)

    def call(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
        # A request that changes something first looks: the key is for its one call that changes.
        ours = tuple(pair for pair in _current.get() if not (looks and pair[0] == _KEY))
        given = tuple(pair for pair in metadata or () if pair[0] not in {key for key, _ in ours})
        return method(*arguments, metadata=(*given, *ours), **options)

    return call
