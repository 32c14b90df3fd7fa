"""A controller with its edge, as the daemon has it, in this process; on a socket and on ports of this computer."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from forkypig.controller.app import SERVICES, App, controller
from forkypig.controller.store import tenants
from forkypig.daemon.server import SERVER_OPTIONS
from forkypig.daemon.settings import Settings
from forkypig.model.tenants import Tenant
from forkypig.v1 import auth_pb2 as pb
from forkypig.v1 import auth_pb2_grpc, common_pb2
from forkypig.wire.status import rpc_errors
from tests.component.controller_rig import Client, eventually


@dataclass
class Served:
    """A controller that serves."""

    settings: Settings
    app: App
    ports: list[int]  # of settings.listen and listen_certificates, where they are set

    @contextlib.asynccontextmanager
    async def client(self, token: str = "", **metadata: str) -> AsyncIterator["Caller"]:
        """Over the controller's own socket."""
        async with grpc.aio.insecure_channel(f"unix:{self.settings.socket('controller')}") as channel:
            yield Caller(channel, token, **metadata)

    async def token(self, role: str = "user", tenant: str = "acme", lifetime_s: int = 0, name: str = "") -> str:
        """A new one's text."""
        await self.tenant(tenant)
        async with self.client() as operator:
            request = pb.CreateTokenRequest(role=role, tenant=tenant, lifetime_s=lifetime_s, name=name)
            return (await operator.auth("CreateToken", request)).secret

    async def tenant(self, name: str) -> None:
        """Makes it, where it is not there."""
        async with self.app.desk.store.write() as tx:
            if await tenants.get(tx, name) is None:
                await tenants.add(tx, Tenant(name=name, created_us=1))

    def audit(self) -> str:
        return (self.settings.audit / "audit.jsonl").read_text()

    async def audit_with(self, *words: str) -> str:
        """The log, when all of these are in it: a call is written down beside its answer."""

        async def are_there() -> bool:
            return all(word in self.audit() for word in words)

        await eventually(are_there)
        return self.audit()


class Caller(Client):
    """Somebody's calls."""

    def __init__(self, channel: grpc.aio.Channel, token: str = "", **metadata: str) -> None:
        super().__init__(channel)
        self.channel = channel
        self._auth: Any = auth_pb2_grpc.AuthStub(channel)
        self.metadata = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        if token:
            self.metadata.append(("authorization", f"Bearer {token}"))

    async def call(self, method: str, request: Any = None) -> Any:
        with rpc_errors():
            return await getattr(self.stub, method)(request or common_pb2.Empty(), **self.options)

    async def auth(self, method: str, request: Any = None) -> Any:
        with rpc_errors():
            return await getattr(self._auth, method)(request or common_pb2.Empty(), **self.options)

    @property
    def options(self) -> dict[str, Any]:
        return {"timeout": 30, "metadata": self.metadata}


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Served]:
    path = settings.socket("controller")
    async with (
        controller(settings) as app,
        app.access.local_users.serving(settings.users_socket, path),
    ):
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(app.access.edge,))
        app.register(server)
        reflection.enable_server_reflection([*SERVICES, reflection.SERVICE_NAME], server)
        server.add_insecure_port(f"unix:{path}")
        ports = app.access.bind(server)
        await server.start()
        try:
            yield Served(settings, app, ports)
        finally:
            await app.desk.journal.stop()
            await server.stop(0.5)
            path.unlink(missing_ok=True)
