"""forkypig.v1.Agent on the host: gRPC calls become calls on the channel of a machine's agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from forkypig.errors import ForkyError, InvalidRequest
from forkypig.guest.calls import ExecCall, ExecSpec, Exited, Output, Started
from forkypig.guest.channel import GuestChannel
from forkypig.hostd.host import Host
from forkypig.v1 import agent_pb2 as pb
from forkypig.v1 import agent_pb2_grpc
from forkypig.wire.edge import answered, streamed

log = structlog.get_logger()
_Context = grpc.aio.ServicerContext[Any, Any]


class AgentServicer(agent_pb2_grpc.AgentServicer):
    """Serves the agents of all machines of this host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def _agent(self, machine: str) -> GuestChannel:
        return await self._host.machine(machine).ready_agent()

    @streamed
    async def Exec(
        self, request_iterator: AsyncIterator[pb.ExecRequest], context: _Context
    ) -> AsyncIterator[pb.ExecResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidRequest("the first message of Exec must be `start`")
        call = await (await self._agent(first.start.machine)).exec(_spec(first.start))
        feeding = asyncio.create_task(_feed(call, request_iterator))
        try:
            async for event in call:
                yield _response(event)
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})
            call.close()

    @streamed
    async def Download(self, request: pb.DownloadRequest, context: _Context) -> AsyncIterator[pb.DownloadResponse]:
        _check_absolute(request.path)
        async for data in (await self._agent(request.machine)).download(request.path):
            yield pb.DownloadResponse(data=data)

    @answered
    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: _Context) -> pb.UploadResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidRequest("the first message of Upload must be `start`")
        _check_absolute(first.start.directory)
        upload = await (await self._agent(first.start.machine)).upload(first.start.directory)
        with contextlib.closing(upload):
            async for request in request_iterator:
                await upload.write(request.data)
            files, size_bytes = await upload.finish()
        return pb.UploadResponse(files=files, bytes=size_bytes)

    @answered
    async def StatPath(self, request: pb.StatPathRequest, context: _Context) -> pb.StatPathResponse:
        _check_absolute(request.path)
        found = await (await self._agent(request.machine)).stat(request.path)
        return pb.StatPathResponse(
            exists=found.exists, directory=found.directory, size_bytes=found.size_bytes, mode=found.mode
        )


async def _feed(call: ExecCall, requests: AsyncIterator[pb.ExecRequest]) -> None:
    """Passes on what the caller sends, until the caller has no more or the command is over."""
    with contextlib.suppress(ForkyError, grpc.aio.UsageError):
        async for request in requests:
            match request.WhichOneof("request"):
                case "stdin":
                    await call.write(request.stdin)
                case "stdin_closed":
                    call.close_stdin()
                case "resize":
                    call.resize(request.resize.rows, request.resize.columns)
                case "signal":
                    call.signal(request.signal)
                case _:
                    return
        call.close_stdin()


def _spec(start: pb.ExecStart) -> ExecSpec:
    if not start.argv or not start.argv[0]:
        raise InvalidRequest("there is no command to run: forky exec MACHINE -- COMMAND")
    for text in (*start.argv, *start.environment, *start.environment.values(), start.directory, start.user):
        if "\0" in text:
            raise InvalidRequest("a command, its environment, directory and user can't contain NUL bytes")
    terminal = (start.terminal.rows, start.terminal.columns) if start.HasField("terminal") else None
    return ExecSpec(
        argv=tuple(start.argv),
        environment=dict(start.environment),
        directory=start.directory,
        user=start.user,
        timeout_s=start.timeout_s,
        terminal=terminal,
        stdin=start.stdin,
    )


def _response(event: Started | Output | Exited) -> pb.ExecResponse:
    if isinstance(event, Started):
        return pb.ExecResponse(started=pb.ExecStarted(pid=event.pid))
    if isinstance(event, Exited):
        return pb.ExecResponse(exit=pb.ExecExit(code=event.code, timed_out=event.timed_out, failure=event.failure))
    return pb.ExecResponse(stderr=event.data) if event.fd == 2 else pb.ExecResponse(stdout=event.data)


def _check_absolute(path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"«{path[:200]}» is not an absolute path in a machine")
