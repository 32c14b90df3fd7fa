"""A process that behaves as a daemon of ours does towards `forky up` and `down`. Arguments: its name, and its manner:
good, stubborn (does not end by SIGTERM), broken (does not start), slow (has begun, and comes no further), deaf (refuses
to shut machines down)."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from forkypig import errors
from forkypig.daemon.home import home_from_environment
from forkypig.daemon.server import PidFile
from forkypig.v1 import common_pb2, host_pb2_grpc
from forkypig.wire import status


class Host(host_pb2_grpc.HostServicer):
    """Only Shutdown."""

    def __init__(self, home: Path, deaf: bool) -> None:
        self.home, self.deaf = home, deaf

    async def Shutdown(self, request: Any, context: Any) -> AsyncIterator[common_pb2.Progress]:  # noqa: N802
        if self.deaf:
            await status.abort(context, errors.ResourceExhausted("the disk is full"))
        with (self.home / "shutdowns").open("a") as file:
            file.write("x")
        yield common_pb2.Progress(step="shutting down machines", done=1, total=2)


async def main(name: str, manner: str) -> None:
    if manner == "broken":
        sys.exit(f"{name} is broken: no such luck")
    place = home_from_environment()
    if manner == "slow":
        (place.home / "slow").write_text(str(os.getpid()))
        await asyncio.Event().wait()
    _held = PidFile(place.pid_file(name))
    place.socket(name).unlink(missing_ok=True)
    server = grpc.aio.server()
    host_pb2_grpc.add_HostServicer_to_server(Host(place.home, manner == "deaf"), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"unix:{place.socket(name)}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if manner == "stubborn" else stop.set)
    with (place.home / "starts").open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    await server.start()  # from here on it may be ended
    await stop.wait()
    await server.stop(None)


asyncio.run(main(*sys.argv[1:]))
