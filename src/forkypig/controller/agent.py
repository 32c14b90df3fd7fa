"""The Agent service: what users do inside machines, passed on to the host both ways as it comes.

Nothing is buffered here beyond one message each way: gRPC's flow control reaches from the guest to the user. A user
that goes away ends the host's call, and with it the command.
"""

# gRPC names a servicer's methods as the .proto does.
# ruff: noqa: N802

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from forkypig.controller.admission import Admission
from forkypig.controller.desk import find_machine
from forkypig.controller.host import Host, followed, host_errors
from forkypig.controller.leases import Leases
from forkypig.controller.store import Store
from forkypig.controller.streams import first_of, resumed
from forkypig.errors import InvalidRequest
from forkypig.v1 import agent_pb2 as pb
from forkypig.v1 import agent_pb2_grpc
from forkypig.wire.edge import answered, streamed
from forkypig.wire.ending import Ending

Context = grpc.aio.ServicerContext[Any, Any]

# Of a call that is asked once and answered once; the guest may be one of many on busy cores.
_STAT_S = 60.0


class AgentServicer(agent_pb2_grpc.AgentServicer):
    """forkypig.v1.Agent."""

    def __init__(self, store: Store, host: Host, admission: Admission, leases: Leases) -> None:
        self._store, self._host, self._admission, self._leases = store, host, admission, leases

    @contextmanager
    def _using(self, machine: str) -> Iterator[None]:
        """In the block somebody is in the machine: it is not idle, and its lease does not end."""
        with self._admission.using(machine), self._leases.using(machine):
            yield

    async def _id(self, machine: str) -> str:
        async with self._store.glance() as tx:
            return (await find_machine(tx, machine)).id

    @streamed
    async def Exec(self, request_iterator: Any, context: Context) -> AsyncIterator[pb.ExecResponse]:
        began = time.perf_counter()
        first = await first_of(request_iterator)
        if not first.HasField("start"):
            raise InvalidRequest("an exec begins with `start`: say the machine and the command first")
        first.start.machine = await self._id(first.start.machine)
        call = self._host.agent.Exec(resumed(first, request_iterator))
        with self._using(first.start.machine):
            async with aclosing(followed(call)) as responses:
                async for response in responses:
                    self._measure(response, first.start, time.perf_counter() - began)
                    yield response
                    if response.HasField("exit"):
                        return

    def _measure(self, response: pb.ExecResponse, start: pb.ExecStart, seconds: float) -> None:
        which = response.WhichOneof("response")
        if which == "started":
            self._host.measured.started(seconds)
        elif which == "exit" and not start.HasField("terminal"):
            self._host.measured.ended(seconds)

    @answered
    async def Upload(self, request_iterator: Any, context: Context) -> pb.UploadResponse:
        first = await first_of(request_iterator)
        if not first.HasField("start"):
            raise InvalidRequest("an upload begins with `start`: say the machine and the directory first")
        first.start.machine = await self._id(first.start.machine)
        call = self._host.agent.Upload(resumed(first, request_iterator))
        ending = Ending(call)
        try:
            with host_errors(), ending, self._using(first.start.machine):
                return await call
        finally:
            call.cancel()

    @streamed
    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.DownloadResponse]:
        request.machine = await self._id(request.machine)
        with self._using(request.machine):
            async with aclosing(followed(self._host.agent.Download(request))) as responses:
                async for response in responses:
                    yield response

    @answered
    async def StatPath(self, request: pb.StatPathRequest, context: Context) -> pb.StatPathResponse:
        request.machine = await self._id(request.machine)
        with host_errors(), self._using(request.machine):
            return await self._host.agent.StatPath(request, timeout=_STAT_S)
