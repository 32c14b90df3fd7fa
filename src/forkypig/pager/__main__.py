"""`python -m forkypig.pager`: serves the memory of snapshots until SIGTERM."""

import asyncio
import os
import sys

import grpc
import pyfuse3
import structlog

from forkypig.daemon import logs
from forkypig.daemon.server import AlreadyRunning, PidFile, now_us, raise_open_files, serve
from forkypig.daemon.settings import Settings
from forkypig.pager import fuse_loop, mount
from forkypig.pager.catalogue import Catalogue
from forkypig.pager.content import Content
from forkypig.pager.filesystem import FileSystem
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.service import PagerServicer
from forkypig.pager.shelf import Shelf
from forkypig.pager.starts import Starts
from forkypig.v1 import pager_pb2, pager_pb2_grpc

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Mounts, offers what is packed, and serves."""
    shelf = Shelf(settings.store, settings.images)
    reader = ReaderLink(settings.store)
    layers = FrozenLayers()
    content = Content(layers, reader)
    starts = Starts(content, shelf, settings.memory)
    catalogue = Catalogue(layers, reader, starts, shelf, settings.memory)
    catalogue.load()
    await reader.start()
    fuse_loop.enable()
    pyfuse3.init(FileSystem(catalogue, content), str(settings.memory), mount.options())
    fuse = asyncio.create_task(fuse_loop.run(), name="fuse")
    stop = asyncio.Event()
    fuse.add_done_callback(lambda _: stop.set())
    try:
        await asyncio.to_thread(mount.tune, settings.memory, settings.run / "fusectl")
        names = [pager_pb2.DESCRIPTOR.services_by_name["Pager"].full_name]
        servicer = PagerServicer(catalogue, reader, settings.memory, now_us())

        def register(server: grpc.aio.Server) -> None:
            pager_pb2_grpc.add_PagerServicer_to_server(servicer, server)

        async def close() -> None:
            await catalogue.close()
            await starts.close()

        await serve(settings, "pager", register, names, before_stop=close, stop=stop)
    finally:
        # Lazily: mappings that are open still fail later, at their next fault, and hold up nothing here.
        mount.detach(settings.memory)
        if not fuse.done():
            pyfuse3.terminate()
            await asyncio.wait({fuse}, timeout=2.0)
        pyfuse3.close(unmount=False)
        await reader.close()


def prepare(settings: Settings) -> None:
    """Makes the directories. Raises OSError."""
    for directory in (settings.home, settings.run, settings.store):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount.detach(settings.memory)  # a crash leaves a mount whose every use is ENOTCONN
    settings.memory.mkdir(mode=0o700, exist_ok=True)


def main() -> int:
    settings = Settings()
    settings.check()
    logs.configure("pager", settings.log_level)
    os.umask(0o077)
    settings.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock = PidFile(settings.pid_file("pager"))
    except AlreadyRunning:
        print(f"the pager runs already for {settings.home}", file=sys.stderr)
        return 1
    raise_open_files()
    prepare(settings)
    asyncio.run(run(settings))
    del lock
    return 0


if __name__ == "__main__":
    sys.exit(main())
