"""`python -m forkypig.pager.holder FUSE_FD INBOX_FD KEEPER HOME LOG_LEVEL [--taken-over] [--kept]`: serves a mount
until SIGTERM, for a keeper.

When the keeper dies this serves on and starts the next one, unless somebody else does: --kept.
"""

if __name__ == "__main__":
    import forkypig.daemon.lean  # noqa: F401

import asyncio
import contextlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import structlog

from forkypig.daemon import logs
from forkypig.daemon.server import now_us, raise_open_files, serve
from forkypig.daemon.settings import Settings, handed_over
from forkypig.errors import InvalidRequest
from forkypig.pager import kept_key, mount, roll, succession
from forkypig.pager.catalogue import Catalogue
from forkypig.pager.content import Content
from forkypig.pager.filesystem import FileSystem
from forkypig.pager.fuse import ROOT, Connection
from forkypig.pager.inbox import Inbox
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.service import PagerServicer
from forkypig.pager.shelf import Shelf
from forkypig.pager.snapshot import Snapshot
from forkypig.pager.starts import Starts
from forkypig.v1 import pager_pb2, pager_pb2_grpc
from forkypig.wire.edge import Reader

log = structlog.get_logger()

# Whoever ends both at once must not meet a keeper that has just been started. Nothing waits for it.
_NEXT_KEEPER_S = 1.0
_KEEPER_STARTS_S = 10.0  # one that finds another in its place has ended by then


async def run(settings: Settings, fd: int, inbox: Inbox, keeper: int | None, *, taken_over: bool) -> None:
    """Offers what is packed, and what was frozen when it takes over, and serves. `keeper` None: nobody watches it."""
    shelf = Shelf(settings.store, settings.images)
    reader = ReaderLink(settings.store)
    layers = FrozenLayers()
    content = Content(layers, reader)
    starts = Starts(content, shelf, settings.memory)
    roll_file = settings.run / "frozen.json"
    catalogue = Catalogue(layers, reader, starts, shelf, settings.memory)
    catalogue.load()
    await reader.start()
    connection = Connection(fd, FileSystem(catalogue, content), inbox)
    starts.store = connection.store
    if taken_over:
        await roll.call(roll_file, catalogue)
    catalogue.on_frozen_change = lambda: roll.write(roll_file, catalogue.snapshots.values())
    # One thread: it may wait for a look-up in the directory, which we answer meanwhile.
    names = ThreadPoolExecutor(1, "names")

    def forgotten(snapshot: Snapshot) -> None:
        names.submit(partial(_forget_name, connection, snapshot.id))

    catalogue.on_forget = forgotten
    if taken_over:
        connection.take_over()
    connection.start()
    watching = asyncio.create_task(_watch(settings, keeper)) if keeper is not None else None
    try:
        tuning = asyncio.create_task(asyncio.to_thread(mount.tune, settings.memory))
        service = [pager_pb2.DESCRIPTOR.services_by_name["Pager"].full_name]
        servicer = PagerServicer(catalogue, reader, settings.memory, now_us(), connection.latency)

        def register(server: grpc.aio.Server) -> None:
            pager_pb2_grpc.add_PagerServicer_to_server(servicer, server)

        async def close() -> None:
            await catalogue.close()
            await starts.close()

        end = connection.ended
        await serve(settings, "pager", register, service, before_stop=close, stop=end, interceptors=[Reader()])
        await tuning
    finally:
        if watching is not None:
            watching.cancel()
        # Lazily: mappings that are open still fail later, at their next fault, and hold up nothing here.
        mount.detach(settings.memory)
        await connection.close()
        await reader.close()
        names.shutdown(wait=False, cancel_futures=True)


async def _watch(settings: Settings, keeper: int) -> None:
    """Starts the next keeper each time that one has died, unless somebody else has."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            await _end_of(keeper)
        await asyncio.sleep(_NEXT_KEEPER_S)
        log.error("the keeper died: the next is started", pid=keeper)
        words = [sys.executable, "-P", "-m", "forkypig.pager"]
        words += [succession.AFTER, str(settings.home), settings.log_level]
        started = await asyncio.create_subprocess_exec(*words, start_new_session=True, pass_fds=kept_key.descriptors())
        keeper = started.pid
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(started.wait(), _KEEPER_STARTS_S)
            keeper = json.loads(settings.pid_file("pager").read_bytes())["pid"]  # somebody else was quicker


async def _end_of(pid: int) -> None:
    """Raises ProcessLookupError when it is over already."""
    pidfd, ended, loop = os.pidfd_open(pid), asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _forget_name(connection: Connection, name: str) -> None:
    with contextlib.suppress(OSError):  # the kernel has not cached it
        connection.forget_name(ROOT, name)


def main() -> int:
    settings = handed_over(Path(sys.argv[4]), sys.argv[5])
    logs.configure("pager", settings.log_level)
    os.umask(0o077)
    raise_open_files()
    fd, inbox, keeper = (int(word) for word in sys.argv[1:4])
    for each in (fd, inbox, *kept_key.descriptors()):
        os.set_inheritable(each, False)
    succession.write(settings.run / "holder.json", fd, inbox, *kept_key.descriptors())
    watched = None if "--kept" in sys.argv else keeper
    try:
        asyncio.run(run(settings, fd, Inbox(inbox), watched, taken_over="--taken-over" in sys.argv))
    except InvalidRequest as error:  # another key than the store's
        print(f"the pager can't serve {settings.home}: {error}", file=sys.stderr, flush=True)
        return succession.CAN_NOT_BE
    return 0


if __name__ == "__main__":
    sys.exit(main())
