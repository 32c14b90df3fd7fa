"""The channel to a daemon, and what its failures are called.

Deadlines are generous on purpose: they end a wait on a daemon that hangs, they do not hurry one that works. Under
TCG on a busy computer one boot takes tens of seconds.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forkypig import errors, tracing
from forkypig.sdk.address import Endpoint, Identity, Remote
from forkypig.sdk.resilient import Channel
from forkypig.wire import status

_T = TypeVar("_T")

QUICK_S = 60.0  # answers from a database or one QMP command
MACHINE_S = 300.0  # starts, stops or removes a machine
LONG_S = 3600.0  # may build an image or write gigabytes

_OPTIONS = (
    # The controller's answer on a thousand machines and their history is larger than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
    # A daemon that was restarted is found again at once, not after gRPC's back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Each of our channels has its own connection: closing one never disturbs another.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
# A connection over a network that has died silently (a laptop that slept) is noticed.
_FAR_OPTIONS = (("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000))


def open_channel(
    socket: Endpoint,
    identity: Identity | None = None,
    wrap: Callable[[grpc.aio.Channel], grpc.aio.Channel] | None = None,
) -> grpc.aio.Channel:
    """A channel to `socket`, or to an address; nothing is connected until the first call. With an identity its calls
    say whose they are, and come again when the connection breaks; `wrap` goes around gRPC's own channel.
    Raises OSError where a file can't be read."""
    carried = tracing.interceptors()
    if isinstance(socket, Path):
        channel = grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS, interceptors=carried)
    elif socket.tls:
        authorities, certificate, key = (
            path.read_bytes() if path is not None else None for path in (socket.ca, socket.certificate, socket.key)
        )
        credentials = grpc.ssl_channel_credentials(authorities, key, certificate)
        channel = grpc.aio.secure_channel(str(socket.at), credentials, (*_OPTIONS, *_FAR_OPTIONS), interceptors=carried)
    else:
        channel = grpc.aio.insecure_channel(str(socket.at), (*_OPTIONS, *_FAR_OPTIONS), interceptors=carried)
    if wrap is not None:
        channel = wrap(channel)
    return Channel(channel, identity.metadata()) if identity is not None else channel


@contextmanager
def calls(socket: Endpoint) -> Iterator[None]:
    """Turns gRPC's errors into ours; one that comes from the transport names the socket and the way out."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        ours = status.from_rpc_error(error)
        if isinstance(ours, errors.HostUnreachable) and not _said_by_daemon(error):
            ours = errors.HostUnreachable(
                f"the controller at {socket} can't be reached: {_what_to_do(socket)}"
                if not isinstance(socket, Path)
                else f"the {socket.stem} at {socket} can't be reached: start it with `forky up`, "
                f"or see {socket.parent.parent / 'logs'}"
            )
        raise ours from error


def _what_to_do(remote: Remote) -> str:
    """gRPC's details say only sometimes that a certificate was the reason."""
    told = "see FORKY_CONTROLLER, and whether it listens there (FORKY_LISTEN)"
    return f"{told}; FORKY_CA is to be the ca.crt of its `forky auth init`" if remote.tls else told


async def translated(socket: Endpoint, stream: AsyncIterable[_T]) -> AsyncIterator[_T]:
    """The items of `stream`, with errors as in `calls`."""
    with calls(socket):
        async for item in stream:
            yield item


def _said_by_daemon(error: grpc.aio.AioRpcError) -> bool:
    return any(key == "forky-error" for key, _ in error.trailing_metadata() or ())


async def is_healthy(socket: Path, timeout_s: float) -> bool:
    """Whether the daemon behind `socket` says that it serves."""
    async with open_channel(socket) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(  # type: ignore[attr-defined]  # the published stubs leave it out
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
