"""Controllers to test: in this process, or as the daemon that it is, to be killed; and a client of either."""

import asyncio
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc

from forkypig.controller.app import controller
from forkypig.controller.store import sqlite
from forkypig.daemon.settings import Settings
from forkypig.v1 import (
    agent_pb2_grpc,
    controller_pb2_grpc,
    observe_pb2_grpc,
    pools_pb2,
    pools_pb2_grpc,
    tenants_pb2_grpc,
)
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire.status import rpc_errors
from tests.component.fake_host import FakeHost
from tests.component.metadata import with_metadata

# gRPC would wait for a second and more before it tries again.
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))


class Client:
    """A user's calls, with our errors."""

    def __init__(self, channel: grpc.aio.Channel, tenant: str = "") -> None:
        self._channel = channel
        channel = with_metadata(channel, [("forky-tenant", tenant)] if tenant else [])
        self.stub: Any = controller_pb2_grpc.ControllerStub(channel)
        self.agent: Any = agent_pb2_grpc.AgentStub(channel)
        self.pools: Any = pools_pb2_grpc.PoolsStub(channel)
        self.observation: Any = observe_pb2_grpc.ObservationStub(channel)
        self.tenants: Any = tenants_pb2_grpc.TenantsStub(channel)

    @property
    def options(self) -> dict[str, Any]:
        """Of every call."""
        return {"timeout": 30}

    def in_tenant(self, tenant: str) -> "Client":
        """The operator's calls in another tenant."""
        return Client(self._channel, tenant)

    async def run(self, name: str = "", **fields: Any) -> common.Machine:
        return (await self.run_all(name, **fields))[-1].result.machine

    async def run_all(self, name: str = "", **fields: Any) -> list[pb.RunMachineResponse]:
        call = self.stub.RunMachine(pb.RunMachineRequest(name=name, **fields), **self.options)
        try:
            with rpc_errors():
                return [update async for update in call]
        finally:
            call.cancel()

    async def fork(self, source: str, count: int = 1, **fields: Any) -> common.ForkResult:
        with rpc_errors():
            return await self.stub.Fork(pb.ForkRequest(source=source, count=count, **fields), timeout=30)

    async def call(self, method: str, request: Any = None) -> Any:
        with rpc_errors():
            return await getattr(self.stub, method)(request or common.Empty(), timeout=30)

    async def machine(self, method: str, machine: str) -> Any:
        return await self.call(method, pb.MachineRequest(machine=machine))

    async def pool(self, method: str, request: Any) -> Any:
        with rpc_errors():
            return await getattr(self.pools, method)(request, timeout=30)

    async def status(self, name: str = "py") -> pools_pb2.Pool:
        return await self.pool("GetPool", pools_pb2.PoolRequest(pool=name))

    async def acquire(self, **fields: Any) -> pools_pb2.AcquireResponse:
        return await self.pool("Acquire", pools_pb2.AcquireRequest(**{"pool": "py", "wait_s": 10, **fields}))

    async def release(self, machine: str, **fields: Any) -> Any:
        return await self.pool("Release", pools_pb2.ReleaseRequest(machine=machine, **fields))

    async def machines(self) -> dict[str, common.Machine]:
        return {m.name: m for m in (await self.call("ListMachines")).machines}

    async def snapshots(self) -> dict[str, common.Snapshot]:
        return {s.id: s for s in (await self.call("ListSnapshots")).snapshots}

    async def events(self) -> list[str]:
        return [e.kind for e in (await self.call("ListEvents", pb.ListEventsRequest())).events]


async def eventually(condition: Any, timeout_s: float = 30.0) -> Any:
    """Waits until `await condition()` is true; fails the test when it does not become so."""
    async with asyncio.timeout(timeout_s):
        while not (result := await condition()):
            await asyncio.sleep(0.02)
    return result


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Client]:
    """A controller and a client of it."""
    path = settings.socket("controller")
    async with controller(settings) as app:
        server = grpc.aio.server(interceptors=app.interceptors)
        app.register(server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                try:
                    yield Client(channel)
                finally:  # before its callers leave, as the daemon does
                    await app.desk.journal.stop()
        finally:
            await server.stop(0.5)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def home(database_url: str = "", hostd: str = "", **fields: Any) -> Iterator[Settings]:
    """An instance of its own. Not below pytest's directory: the paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="fp") as directory:
        made = Settings(home=Path(directory), database_url=database_url, hostd=hostd, **fields)
        made.run.mkdir(mode=0o700)
        if not database_url:
            made.database.touch(mode=0o600)
            made.database.write_bytes(_migrated())
        yield made


@functools.cache
def _migrated() -> bytes:
    """A new database with its tables: every controller would make the same, and import alembic for it."""
    with tempfile.TemporaryDirectory(prefix="fp") as directory:
        path = Path(directory) / "controller.db"
        sqlite.migrate(path, busy_timeout_s=5.0)
        return path.read_bytes()


@contextlib.asynccontextmanager
async def running_host(settings: Settings) -> AsyncIterator[FakeHost]:
    fake = FakeHost(settings.socket("hostd"))
    await fake.start()
    try:
        yield fake
    finally:
        await fake.stop()


class Daemon:
    """`python -m forkypig.controller`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> asyncio.subprocess.Process:
        settings = self._settings
        environment = {
            **os.environ,
            "FORKY_HOME": str(settings.home),
            "FORKY_DATABASE": settings.database_url,
            "FORKY_HOSTD": settings.hostd,
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "forkypig.controller", env=environment, stderr=asyncio.subprocess.PIPE
        )
        return self.process

    async def kill(self) -> None:
        """As kill -9 does."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@contextlib.asynccontextmanager
async def daemon(settings: Settings) -> AsyncIterator[tuple[Daemon, Client]]:
    """The daemon as a process, serving; it is killed at the end, if it was not before."""
    made = Daemon(settings)
    await made.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{settings.socket('controller')}", options=_OPTIONS) as channel:
            client = Client(channel)
            # Starting Python and importing gRPC takes seconds where every core is taken.
            await client.stub.GetStatus(common.Empty(), wait_for_ready=True, timeout=50)
            yield made, client
    finally:
        await made.kill()
