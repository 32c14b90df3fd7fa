"""`python -m forkypig.pager.holder FUSE_FD [--taken-over]`: serves a mount until SIGTERM. Started by the keeper."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import structlog

from forkypig.daemon import logs
from forkypig.daemon.server import now_us, raise_open_files, serve
from forkypig.daemon.settings import Settings
from forkypig.pager import mount, roll
from forkypig.pager.catalogue import Catalogue
from forkypig.pager.content import Content
from forkypig.pager.filesystem import FileSystem
from forkypig.pager.fuse import ROOT, Connection
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.service import PagerServicer
from forkypig.pager.shelf import Shelf
from forkypig.pager.snapshot import Snapshot
from forkypig.pager.starts import Starts
from forkypig.v1 import pager_pb2, pager_pb2_grpc

log = structlog.get_logger()

_PR_SET_PDEATHSIG = 1


async def run(settings: Settings, fd: int, *, taken_over: bool) -> None:
    """Offers what is packed, and what was frozen when it takes over, and serves."""
    shelf = Shelf(settings.store, settings.images)
    reader = ReaderLink(settings.store)
    layers = FrozenLayers()
    content = Content(layers, reader)
    starts = Starts(content, shelf, settings.memory)
    roll_file = settings.run / "frozen.json"
    catalogue = Catalogue(layers, reader, starts, shelf, settings.memory)
    catalogue.load()
    await reader.start()
    connection = Connection(fd, FileSystem(catalogue, content))
    starts.store = connection.store
    if taken_over:
        await roll.call(roll_file, catalogue)
    catalogue.on_frozen_change = lambda: roll.write(roll_file, catalogue.snapshots.values())
    # One thread: it may wait for a look-up in the directory, which we answer meanwhile.
    names = ThreadPoolExecutor(1, "names")

    def forgotten(snapshot: Snapshot) -> None:
        names.submit(partial(_forget_name, connection, snapshot.id))

    catalogue.on_forget = forgotten
    connection.start()
    if taken_over:
        connection.resend()
    try:
        tuning = asyncio.create_task(asyncio.to_thread(mount.tune, settings.memory))
        service = [pager_pb2.DESCRIPTOR.services_by_name["Pager"].full_name]
        servicer = PagerServicer(catalogue, reader, settings.memory, now_us(), connection.latency)

        def register(server: grpc.aio.Server) -> None:
            pager_pb2_grpc.add_PagerServicer_to_server(servicer, server)

        async def close() -> None:
            await catalogue.close()
            await starts.close()

        await serve(settings, "pager", register, service, before_stop=close, stop=connection.ended)
        await tuning
    finally:
        # Lazily: mappings that are open still fail later, at their next fault, and hold up nothing here.
        mount.detach(settings.memory)
        await connection.close()
        await reader.close()
        names.shutdown(wait=False, cancel_futures=True)


def _forget_name(connection: Connection, name: str) -> None:
    with contextlib.suppress(OSError):  # the kernel has not cached it
        connection.forget_name(ROOT, name)


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    settings = Settings()
    logs.configure("pager", settings.log_level)
    os.umask(0o077)
    raise_open_files()
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    asyncio.run(run(settings, fd, taken_over="--taken-over" in sys.argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
