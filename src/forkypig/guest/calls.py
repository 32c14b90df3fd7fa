"""Calls into a guest: their events, their flow control, and what their users hold. No sockets here."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from forkypig.agent import agent as wire
from forkypig.errors import ForkyError, GuestUnresponsive, InvalidRequest, NotFound, NotPossibleNow

_SIGNALS = range(1, 65)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecSpec:
    """A command to run in a guest."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the user's default one
    directory: str = ""  # empty: the user's home
    user: str = ""  # name or number; empty: root
    timeout_s: float = 0.0  # 0: none
    terminal: tuple[int, int] | None = None  # rows, columns; stderr comes as stdout then
    stdin: bool = False  # False: the command reads /dev/null

    def pack(self) -> bytes:
        """The request as it goes over the channel. Raises InvalidRequest."""
        if not self.argv or not self.argv[0]:
            raise InvalidRequest("there is no command to run: give at least its name")
        texts = [*self.argv, *self.environment, *self.environment.values(), self.directory, self.user]
        if any("\0" in text for text in texts):
            raise InvalidRequest("a command, its environment and its directory can't have NUL characters in them")
        fields: list[tuple[str, str]] = [("op", "exec")]
        fields += [("argv", argument) for argument in self.argv]
        fields += [("env", f"{name}={value}") for name, value in self.environment.items()]
        fields += [("directory", self.directory)] if self.directory else []
        fields += [("user", self.user)] if self.user else []
        fields += [("timeout", repr(float(self.timeout_s)))] if self.timeout_s > 0 else []
        if self.terminal is not None:
            fields += [("rows", str(self.terminal[0])), ("columns", str(self.terminal[1]))]
        fields += [("stdin", "1")] if self.stdin else []
        return wire.pack(*fields)


@dataclass(frozen=True, slots=True)
class Started:
    """The command runs."""

    pid: int


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of its output."""

    fd: int  # 1 or 2
    data: bytes


@dataclass(frozen=True, slots=True)
class Exited:
    """The command is over."""

    code: int  # as a shell has it; 124 when timed out, 126 or 127 when it could not start
    timed_out: bool = False
    failure: str = ""  # why it could not start


ExecEvent = Started | Output | Exited


class Outlet(Protocol):
    """What a call needs of its channel."""

    machine: str

    def send(self, type_: int, call: int, payload: bytes = b"") -> None:
        """Sends a numbered frame, or keeps it until the channel can."""

    async def room(self) -> None:
        """Waits until the channel may take on more data."""

    def forget(self, call: int) -> None:
        """The call is over."""


class Call:
    """One call: what comes for it, and credit for what goes."""

    def __init__(self, outlet: Outlet, id_: int) -> None:
        self.id = id_
        self._outlet = outlet
        self._events: deque[Started | Output] = deque()
        self._changed = asyncio.Event()
        self._credit = wire.WINDOW
        self._room = asyncio.Event()
        self._granted = wire.WINDOW  # what the guest may still send
        self._consumed = 0
        self.result: dict[str, str] | None = None
        self.failure: ForkyError | None = None

    # -- from the channel

    def on_frame(self, frame: wire.Frame) -> None:
        """Raises ValueError when the guest breaks the protocol; it must not be able to fill the host's memory."""
        if frame.type == wire.DATA:
            self._granted -= len(frame.payload) - 1
            if not frame.payload or self._granted < 0:
                raise ValueError("data without credit")
            self._events.append(Output(frame.payload[0], frame.payload[1:]))
        elif frame.type == wire.STARTED:
            self._events.append(Started(int(dict(wire.unpack(frame.payload)).get("pid", b"0"))))
        elif frame.type == wire.CREDIT:
            self._credit += wire.to_number(frame.payload)
            self._room.set()
        elif frame.type == wire.RESULT:
            self.result = {name: wire.text(value) for name, value in wire.unpack(frame.payload)}
            self._outlet.forget(self.id)
            self._room.set()
        self._changed.set()

    def fail(self, error: ForkyError) -> None:
        """The channel is gone."""
        if self.result is None:
            self.failure = error
        self._changed.set()
        self._room.set()

    # -- to the user

    @property
    def over(self) -> bool:
        """Whether nothing more can be sent."""
        return self.result is not None or self.failure is not None

    async def next(self) -> Started | Output | None:
        """What comes next; None when the call has its result. Raises the channel's failure."""
        while True:
            if self._events:
                event = self._events.popleft()
                if isinstance(event, Output):
                    self._consume(len(event.data))
                return event
            if self.result is not None:
                return None
            if self.failure is not None:
                raise self.failure
            self._changed.clear()
            await self._changed.wait()

    def _consume(self, count: int) -> None:
        self._consumed += count
        if self._consumed >= wire.WINDOW // 4 and not self.over:
            self._granted += self._consumed
            self._outlet.send(wire.CREDIT, self.id, wire.number(self._consumed))
            self._consumed = 0

    async def write(self, data: bytes) -> None:
        """Sends data as far as the guest takes it; when the call is over the rest goes nowhere."""
        view = memoryview(data)
        while view:
            while not self.over and self._credit <= 0:
                self._room.clear()
                await self._room.wait()
            if self.failure is not None:
                raise self.failure
            await self._outlet.room()
            if self.over:
                return
            part = view[: min(wire.CHUNK, self._credit)]
            self._credit -= len(part)
            self._outlet.send(wire.DATA, self.id, b"\0" + part)
            view = view[len(part) :]

    def send(self, type_: int, payload: bytes = b"") -> None:
        """Sends a frame of the call, unless it is over."""
        if not self.over:
            self._outlet.send(type_, self.id, payload)

    def cancel(self) -> None:
        """Ends it: the guest stops what runs for it, and what still comes is thrown away."""
        if not self.over:
            self.send(wire.CONTROL, wire.pack(("cancel", "1")))
            self._outlet.forget(self.id)
            self.result = {"code": "-1", "kind": "failed", "failure": "the caller went away"}
        self._events.clear()
        self._changed.set()
        self._room.set()

    async def finished(self) -> dict[str, str]:
        """The result, when the call has no output. Raises what the guest says went wrong."""
        while await self.next() is not None:
            pass
        return self.checked()

    def checked(self) -> dict[str, str]:
        """The result; raises NotFound or NotPossibleNow when it is a failure."""
        result = self.result or {}
        failure = result.get("failure", "")
        if result.get("kind") == "not-found":
            kind, name = _missing(failure)
            raise NotFound(kind, name, f"look into the machine {self._outlet.machine}")
        if result.get("kind") == "unknown":
            raise GuestUnresponsive(f"machine {self._outlet.machine}: {failure}; build its image anew")
        if failure or result.get("code", "0") != "0":
            reason = failure or f"the agent's work ended with code {result['code']}"
            raise NotPossibleNow(f"machine {self._outlet.machine}: {reason}")
        return result


class ExecCall:
    """A command that runs. Iterate over it for its events; `Exited` is the last."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ended = False

    def __aiter__(self) -> AsyncIterator[ExecEvent]:
        return self

    async def __anext__(self) -> ExecEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._call.next()
        if event is not None:
            return event
        self._ended = True
        result = self._call.result or {}
        return Exited(int(result.get("code", "-1")), result.get("timed-out") == "1", result.get("failure", ""))

    async def write(self, data: bytes) -> None:
        """Gives the command input; waits while it does not take it. After its end the rest is dropped."""
        await self._call.write(data)

    def close_stdin(self) -> None:
        """The input ends here."""
        self._call.send(wire.END_OF_INPUT)

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size."""
        self._call.send(wire.CONTROL, wire.pack(("rows", str(rows)), ("columns", str(columns))))

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group. Raises InvalidRequest for what is none."""
        if number not in _SIGNALS:
            raise InvalidRequest(f"{number} is not a signal: they go from 1 to 64")
        self._call.send(wire.CONTROL, wire.pack(("signal", str(number))))

    def close(self) -> None:
        """The caller goes away: a command that still runs gets SIGHUP, and SIGKILL two seconds later."""
        self._call.cancel()


class Upload:
    """A tar stream on its way into the guest."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def write(self, data: bytes) -> None:
        """The next piece of the stream. An error in the guest is raised by `finish`."""
        await self._call.write(data)

    async def finish(self) -> tuple[int, int]:
        """The stream is complete; returns how many files and bytes were written. Raises NotFound or NotPossibleNow."""
        self._call.send(wire.END_OF_INPUT)
        result = await self._call.finished()
        return int(result.get("files", "0")), int(result.get("bytes", "0"))

    def close(self) -> None:
        """Stops, if it is not finished; what was unpacked stays."""
        self._call.cancel()


def _missing(failure: str) -> tuple[str, str]:
    """What is not there, of the agent's sentence: "file" or "user", and its name."""
    user = re.fullmatch("there is no user «(.*)» in the machine", failure)
    return ("user", user[1]) if user else ("file", failure.removeprefix("No such file or directory: "))
