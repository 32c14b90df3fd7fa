"""Runs one gRPC server on a Unix socket until SIGTERM, with health, reflection and a locked pid file."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forkypig.daemon.home import HomePaths
from forkypig.v1 import common_pb2

VERSION = "0.1.0"
log = structlog.get_logger()

# With gRPC's defaults calls are cancelled at random once a thousand are in flight.
SERVER_OPTIONS = (
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.max_receive_message_length", 64 << 20),
    # Two processes never share a port: the second is to be told.
    ("grpc.so_reuseport", 0),
)

Register = Callable[[grpc.aio.Server], None]


class AlreadyRunning(Exception):
    """Another process of this home holds the daemon's lock."""


class PidFile:
    """A locked file with the daemon's pid. The lock goes with the process, so a stale file never misleads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise AlreadyRunning(path.stem) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid()}).encode(), 0)


def raise_open_files() -> None:
    """As many open files as the host allows: a machine takes some ten of hostd's, a frozen process three of the
    pager's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def daemon_message(started_us: int) -> common_pb2.Daemon:
    """What this process says of itself."""
    return common_pb2.Daemon(pid=os.getpid(), version=VERSION, started_us=started_us)


async def serve(
    paths: HomePaths,
    daemon: str,
    register: Register,
    service_names: Iterable[str],
    *,
    before_stop: Callable[[], Awaitable[None]] | None = None,
    stop: asyncio.Event | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    bind: Callable[[grpc.aio.Server], object] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, or until `stop` is set; then ends open calls and returns.

    The caller holds the PidFile, which is what makes unlinking a left-over socket safe. `bind` adds other addresses
    than the socket; what it raises, this does.
    """
    path = paths.socket(daemon)
    path.unlink(missing_ok=True)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=list(interceptors))
    register(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    stop = stop or asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # before anybody can find us
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    old_umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        if bind is not None:
            bind(server)
        # What is there now stays. To look through its hundred thousand objects would hold up every call for 50 ms now
        # and then, and in hostd the pause of a split.
        gc.freeze()
        await server.start()
    finally:
        os.umask(old_umask)
    for name in ("", *service_names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", socket=str(path), pid=os.getpid())
    tell_systemd()
    await stop.wait()
    log.info("stopping")
    await health_servicer.enter_graceful_shutdown()
    if before_stop is not None:
        await before_stop()
    await server.stop(grace=1.0)
    path.unlink(missing_ok=True)


def tell_systemd() -> None:
    """That we serve, if it has started us (sd_notify(3), Type=notify). Nothing that we start is to speak for us."""
    name = os.environ.pop("NOTIFY_SOCKET", "")
    if not name:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.connect("\0" + name[1:] if name.startswith("@") else name)
        to.send(b"READY=1")


def now_us() -> int:
    """Microseconds since the Unix epoch."""
    return time.time_ns() // 1000
