"""A command that runs in a machine: its output as it comes, its input, its end.

    async with machine.process(["make", "-j4"]) as process:
        async for output in process:
            print(output.stream, output.data)
    print(process.exit_code)

Leaving the block early ends the command in the guest.
"""

import asyncio
import signal as signals
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import grpc

from forkypig import errors
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import calls
from forkypig.v1 import agent_pb2, agent_pb2_grpc
from forkypig.wire.ending import Ending

CHUNK_BYTES = 64 << 10
# The agent ends the command at its timeout; the call itself gives up this much later, when the agent hangs.
_GRACE_S = 30.0

_Call = grpc.aio.StreamStreamCall[agent_pb2.ExecRequest, agent_pb2.ExecResponse]


@dataclass(frozen=True, slots=True)
class Output:
    """Some bytes that the command wrote; on a terminal all of it is "stdout"."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A command's end. `exit_code` is as a shell has it: 128 + n for signal n, 124 when it timed out, 126 or 127
    when it could not start, and then `failure` says why."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is to run. `terminal` is (rows, columns); `timeout_s` 0 is no limit; `directory` "" is the user's home."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    user: str
    timeout_s: float
    terminal: tuple[int, int] | None
    stdin: bool

    def check(self) -> None:
        """Raises InvalidRequest when no machine could run this."""
        if isinstance(self.argv, str):
            raise errors.InvalidRequest('a command is a list of words: ["ls", "-l"], not one string')
        if not self.argv or not self.argv[0]:
            raise errors.InvalidRequest("the command is empty: give at least a program's name")
        words = [*self.argv, *self.environment, *self.environment.values(), self.directory, self.user]
        if any("\0" in word for word in words):
            raise errors.InvalidRequest("a command, its environment and its directory can't hold NUL bytes")
        if bad := [key for key in self.environment if not key or "=" in key]:
            raise errors.InvalidRequest(f"«{bad[0]}» can't be the name of an environment variable")
        if self.timeout_s < 0:
            raise errors.InvalidRequest(f"a timeout of {self.timeout_s:g} s makes no sense: use 0 for none")


class Process:
    """A running command. Made by `Machine.process`; use as an asynchronous context manager."""

    def __init__(self, channel: grpc.aio.Channel, socket: Endpoint, machine: str, command: Command) -> None:
        self._stub = agent_pb2_grpc.AgentStub(channel)
        self._socket, self._machine, self._command = socket, machine, command
        self._call: _Call | None = None
        self._exit: agent_pb2.ExecExit | None = None
        self.pid: int | None = None  # in the guest, known once it started

    @property
    def exit_code(self) -> int:
        """The command's own, as a shell has it. Raises NotPossibleNow while the command runs."""
        return self._ended().code

    @property
    def timed_out(self) -> bool:
        """Whether the command was ended because of its timeout."""
        return self._ended().timed_out

    @property
    def failure(self) -> str:
        """Why the command could not start; empty if it did."""
        return self._ended().failure

    def _ended(self) -> agent_pb2.ExecExit:
        if self._exit is None:
            raise errors.NotPossibleNow("the command has not ended yet: read its output to the end first")
        return self._exit

    async def __aenter__(self) -> Self:
        """Starts the command. Raises NotFound, NotPossibleNow or GuestUnresponsive."""
        self._command.check()
        command = self._command
        start = agent_pb2.ExecStart(
            machine=self._machine,
            argv=command.argv,
            environment=command.environment,
            directory=command.directory,
            user=command.user,
            timeout_s=command.timeout_s,
            stdin=command.stdin,
        )
        if command.terminal is not None:
            rows, columns = command.terminal
            start.terminal.CopyFrom(agent_pb2.TerminalSize(rows=rows, columns=columns))
        timeout = command.timeout_s + _GRACE_S if command.timeout_s else None
        self._call = self._stub.Exec(timeout=timeout)
        self._ending = Ending(self._call)
        # Not call.read(): once a write has failed because the command is over, that gives nothing of what came before.
        self._responses = aiter(self._call)
        await self._send(agent_pb2.ExecRequest(start=start))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._call is not None and self._exit is None:
            self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Output]:
        """The output as it comes. Ends with the command; then `exit_code` is there."""
        if self._call is None:
            raise errors.NotPossibleNow("the command was not started: use `async with`")
        while self._exit is None:
            with calls(self._socket), self._ending:
                response = await anext(self._responses, None)
            if response is None:
                raise errors.InternalError(f"the command's exit code never came from «{self._machine}»")
            match response.WhichOneof("response"):
                case "started":
                    self.pid = response.started.pid
                case "stdout":
                    yield Output("stdout", response.stdout)
                case "stderr":
                    yield Output("stderr", response.stderr)
                case "exit":
                    self._exit = response.exit

    async def wait(self) -> int:
        """Reads the rest of the output, drops it, and returns the exit code."""
        async for _ in self:
            pass
        return self.exit_code

    async def write(self, data: bytes) -> None:
        """Gives `data` to the command's standard input, waiting while it does not read.

        Raises NotPossibleNow when the command was started without `stdin` or has ended."""
        if not self._command.stdin:
            raise errors.NotPossibleNow("the command reads no input: start it with stdin=True")
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            await self._send(agent_pb2.ExecRequest(stdin=bytes(view[start : start + CHUNK_BYTES])))

    async def close_stdin(self) -> None:
        """Ends the command's standard input."""
        await self._send(agent_pb2.ExecRequest(stdin_closed=True))

    async def resize(self, rows: int, columns: int) -> None:
        """Tells the command's terminal its new size in characters."""
        await self._send(agent_pb2.ExecRequest(resize=agent_pb2.TerminalSize(rows=rows, columns=columns)))

    async def signal(self, number: int) -> None:
        """Sends a signal to the command (its process group), as kill(2)."""
        await self._send(agent_pb2.ExecRequest(signal=int(number)))

    async def terminate(self) -> None:
        """Asks the command to end (SIGTERM)."""
        await self.signal(signals.SIGTERM)

    async def _send(self, request: agent_pb2.ExecRequest) -> None:
        if self._call is None:
            raise errors.NotPossibleNow("the command was not started: use `async with`")
        try:
            await self._call.write(request)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:
            # The call has ended, and reading tells why, to whoever reads. A start has no such reader yet.
            if request.WhichOneof("request") == "start":
                with calls(self._socket), self._ending:
                    await anext(self._responses)
            raise errors.NotPossibleNow("the command has ended and takes no more input") from error


async def drain(process: Process, stdin: bytes | None, take: Callable[[Output], None]) -> None:
    """Runs the command to its end: feeds it `stdin` and hands on what it writes, both at once so that neither blocks
    the other."""

    async def feed(data: bytes) -> None:
        try:
            await process.write(data)
            await process.close_stdin()
        except errors.NotPossibleNow:
            return  # it ended without reading everything, as programs may

    async with process:
        feeder = asyncio.create_task(feed(stdin)) if stdin is not None else None
        try:
            async for output in process:
                take(output)
        finally:
            if feeder is not None:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)


async def collect(process: Process, stdin: bytes | None) -> ExecResult:
    """Runs the command to its end and gathers what it writes."""
    gathered: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    await drain(process, stdin, lambda output: gathered[output.stream].append(output.data))
    return ExecResult(
        process.exit_code,
        b"".join(gathered["stdout"]),
        b"".join(gathered["stderr"]),
        process.timed_out,
        process.failure,
    )
