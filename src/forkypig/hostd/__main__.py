"""`python -m forkypig.hostd`: the per-host daemon."""

if __name__ == "__main__":
    import forkypig.daemon.lean  # noqa: F401

import asyncio
import sys

import grpc
import structlog

from forkypig.daemon import traces
from forkypig.daemon.foreground import run_daemon
from forkypig.daemon.server import now_us, raise_open_files, serve
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.hostd.adopt import adopt
from forkypig.hostd.fences import FenceInterceptor, Fences
from forkypig.hostd.host import Host
from forkypig.hostd.services.agent import AgentServicer
from forkypig.hostd.services.host import HostServicer
from forkypig.hostd.services.observation import HostObservationServicer
from forkypig.hostd.services.store import HostStoreServicer
from forkypig.hostd.transfer import Transfers
from forkypig.images.store import ImageStore
from forkypig.pager.client import PagerClient
from forkypig.qemu import accelerator, read_ahead
from forkypig.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    host_pb2,
    host_pb2_grpc,
    observe_pb2,
    observe_pb2_grpc,
    store_pb2,
    store_pb2_grpc,
)
from forkypig.wire.edge import Reader

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Adopts what is there, then serves until SIGTERM."""
    started_us = now_us()
    fences = Fences(settings.home / "fences.json")
    build = chosen = None
    try:
        build = await accelerator.qemu_build(settings.qemu)
        images = ImageStore(settings.images)
        kernels = [images.files(image.id).kernel for image in images.list()]
        chosen = await accelerator.choose(
            settings.qemu, settings.accelerator, settings.home / "cache", kernels[0] if kernels else None
        )
        log.info("qemu", build=build.build_id, accelerator=chosen.name, reason=chosen.reason)
    except ForkyError as error:
        log.warning("no usable QEMU", error=str(error))
    async with PagerClient(settings.socket("pager")) as pager:
        try:
            await pager.daemon()  # its pid is needed for the priority of splits
        except ForkyError as error:
            log.warning("no pager", error=str(error))
        host = Host(settings, build, chosen, pager)
        await host.network.open(host)
        await adopt(host)
        services = (
            host_pb2.DESCRIPTOR.services_by_name["Host"],
            agent_pb2.DESCRIPTOR.services_by_name["Agent"],
            store_pb2.DESCRIPTOR.services_by_name["HostStore"],
            observe_pb2.DESCRIPTOR.services_by_name["HostObservation"],
        )

        def register(server: grpc.aio.Server) -> None:
            host_pb2_grpc.add_HostServicer_to_server(HostServicer(host, started_us, fences), server)
            agent_pb2_grpc.add_AgentServicer_to_server(AgentServicer(host), server)
            observe_pb2_grpc.add_HostObservationServicer_to_server(HostObservationServicer(host), server)
            transfers = HostStoreServicer(Transfers(host), host.snapshots)
            store_pb2_grpc.add_HostStoreServicer_to_server(transfers, server)

        names = [s.full_name for s in services]
        interceptors = [Reader(), FenceInterceptor(fences)]
        await serve(settings, "hostd", register, names, before_stop=host.close, interceptors=interceptors)


def _run(settings: Settings) -> None:
    raise_open_files()
    read_ahead.ignore_huge_page_advice()
    traces.begin("forky-hostd")
    asyncio.run(run(settings))


def main() -> int:
    return run_daemon("hostd", "hostd", _run)


if __name__ == "__main__":
    sys.exit(main())
