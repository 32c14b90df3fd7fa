"""The channel to one guest's agent: its session, its moves from one QEMU process to the next, its calls.

The frames and the numbering are the agent's (forkypig.agent.agent says how they work). The channel has one link at a
time. A move puts another in its place: what the guest sent through the old process is read first, then both sides tell
each other the last number they have and send the rest again. Calls notice nothing but the wait.

More than 500 lines, since every method works on the same numbers, link and state: apart, each would need all of them.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

import structlog

from forkypig.agent import agent as wire
from forkypig.errors import ForkyError, GuestUnresponsive, InternalError, InvalidRequest, MachineFailed
from forkypig.guest.calls import Call, ExecCall, ExecSpec, Upload
from forkypig.guest.identity import Identity
from forkypig.guest.link import Link

__all__ = ["AgentInfo", "FileStat", "GuestChannel", "Identity", "Orphans", "State"]

log = structlog.get_logger()

# A greeting or a RESUME may be lost (a guest that boots, a process that is being loaded), so they are repeated: soon at
# first, later seldom, as each takes a child some of its host's time.
_REPEAT_FIRST_S = 0.25
_REPEAT_MAX_S = 2.0
# With calls under way and nothing heard for this long, the guest is asked whether something was lost.
_PROBE_S = 5.0
_CONNECT_S = 5.0
_SETTLE_S = 120.0
# A clock that is off by less was set right, and the greeting lay in the channel for the rest. It is set again at most
# so often: on a host so busy that an answer takes longer, no try would be better.
CLOCK_TOLERANCE_S = 0.05
_CLOCK_TRIES = 3
# The agent answers by its own deadline; this much more is for a guest that waits for its CPU.
_QUIESCE_GRACE_S = 5.0
Orphans = Literal["run", "kill"]


class State(Enum):
    """Where a channel is in its life."""

    NEW = "new"
    GREETING = "greeting"
    OPEN = "open"
    RESUMING = "resuming"  # moved, and the guest has not said yet what it has
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What the agent said to the greeting."""

    version: str
    steps: Mapping[str, str]  # each step of the identity, and what went wrong ("": nothing)
    pid: int = 0
    uptime_s: float = 0.0  # since the guest booted
    greeted_ms: float = 0.0  # from the last greeting sent to its answer


@dataclass(frozen=True, slots=True)
class FileStat:
    """What is at a path in a guest."""

    exists: bool
    directory: bool = False
    size_bytes: int = 0
    mode: int = 0


class GuestChannel:
    """The host's end of the channel to one machine's agent."""

    def __init__(self, machine: str) -> None:
        """`machine` is for messages."""
        self.machine = machine
        self.closed = asyncio.Event()
        self.reason = ""  # why it is closed
        self.state = State.NEW
        self._link: Link | None = None
        self._next_link: Link | None = None
        self._link_ended = ""  # why, when the link ended while a move was prepared
        self._session_id = secrets.token_hex(16)
        self._session = wire.Session(int(self._session_id[:8], 16))
        self._decoder = wire.Decoder()
        self._calls: dict[int, Call] = {}
        self._last_call = 0
        self._identity: Identity | None = None
        self._orphans: Orphans = "run"
        self._welcome: asyncio.Future[dict[str, bytes]] | None = None
        self._resumed = asyncio.Event()
        self._room = asyncio.Event()
        self._repeater: asyncio.Task[None] | None = None
        self._greeted = self._heard = 0.0
        self._stall: asyncio.TimerHandle | None = None

    # -- opening and closing

    async def open(self, path: Path, *, identity: Identity | None, orphans: Orphans, deadline_s: float) -> AgentInfo:
        """Connects to QEMU's socket and begins a session; the machine may not be loaded or booted yet.

        `identity`: what a fork's child takes on before anything else; None: it stays who it is. `orphans`: what happens
        to commands of an earlier session: "run" (they go on, nobody listens), "kill". Raises GuestUnresponsive when no
        answer comes in `deadline_s`, or when the guest could not take on fresh entropy; MachineFailed when QEMU goes.
        """
        started = time.monotonic()
        try:
            await self.connect(path, identity=identity, orphans=orphans, deadline_s=deadline_s)
            return await self.answered(max(0.0, deadline_s - (time.monotonic() - started)))
        except BaseException:
            self._close("it was not opened")
            raise

    async def connect(
        self, path: Path, *, identity: Identity | None, orphans: Orphans, deadline_s: float = _CONNECT_S
    ) -> None:
        """The first half of `open`: connects and sends the greeting, which waits until the guest runs."""
        if self.state is not State.NEW:
            raise InternalError(f"the channel to {self.machine} is {self.state.value}: it can be opened once")
        if identity is not None:
            identity.check()
        self._identity, self._orphans = identity, orphans
        try:
            self._link = await Link.connect(path, deadline_s)
        except OSError as error:
            raise MachineFailed(
                f"the agent's channel of machine {self.machine} can't be reached ({error.strerror or error}): "
                f"its QEMU process is not there; look at `forky logs {self.machine}`"
            ) from error
        self._welcome = asyncio.get_running_loop().create_future()
        self._become(State.GREETING)
        self._link.start(self._on_data, self._on_end)
        self._greet()
        self._repeat(self._greet, State.GREETING)

    async def answered(self, deadline_s: float) -> AgentInfo:
        """The second half of `open`: waits for the answer."""
        assert self._welcome is not None
        try:
            async with asyncio.timeout(deadline_s):
                fields = await self._welcome
        except TimeoutError as error:
            raise GuestUnresponsive(
                f"the agent of machine {self.machine} did not answer in {deadline_s:.0f} s: "
                f"see `forky logs {self.machine}` for what the guest does"
            ) from error
        info = AgentInfo(
            version=wire.text(fields["version"]),
            steps={name[5:]: wire.text(value) for name, value in fields.items() if name.startswith("step:")},
            pid=int(fields["pid"]),
            uptime_s=int(fields["uptime-ns"]) / 1e9,
            greeted_ms=(self._heard - self._greeted) * 1000,
        )
        if self._identity is not None and info.steps.get("entropy", "it was not confirmed"):
            raise GuestUnresponsive(
                f"machine {self.machine} could not take on fresh entropy ({info.steps.get('entropy', 'no answer')}) "
                f"and would repeat its siblings' random numbers: check its kernel and its image's agent"
            )
        if self._identity is not None and abs(int(fields["time-ns"]) / 1e9 - time.time()) > CLOCK_TOLERANCE_S:
            await self.correct_clock(deadline_s)
        return info

    async def correct_clock(self, deadline_s: float) -> None:
        """Something lay in the channel until the guest ran: sets the clock again, until that took no longer than it
        may be off. Raises GuestUnresponsive."""
        try:
            async with asyncio.timeout(deadline_s):
                for _ in range(_CLOCK_TRIES):
                    began = time.monotonic()
                    await self.set_clock()
                    if time.monotonic() - began <= CLOCK_TOLERANCE_S:
                        break
        except TimeoutError as error:
            raise GuestUnresponsive(
                f"the agent of machine {self.machine} greeted and then did not set its clock in {deadline_s:.0f} s: "
                f"see `forky logs {self.machine}` for what the guest does"
            ) from error

    async def close(self) -> None:
        """Ends the channel; calls in flight fail. What they started in the guest goes on until a new session."""
        self._close("it was closed")

    def _close(self, reason: str, error: ForkyError | None = None) -> None:
        if self.state is State.CLOSED:
            return
        self.reason = reason
        self._become(State.CLOSED)
        if self._repeater is not None:
            self._repeater.cancel()
        if self._stall is not None:
            self._stall.cancel()
        for link in (self._link, self._next_link):
            if link is not None:
                link.close()
        failure = error or GuestUnresponsive(f"the channel to machine {self.machine} is closed ({reason}): try again")
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(failure)
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(failure)
            self._welcome.exception()  # nobody may be waiting for it
        self._room.set()
        self._resumed.set()
        self.closed.set()

    # -- moving to a successor

    async def prepare_move(self, path: Path) -> None:
        """Connects to the successor's socket and sends nothing yet. Raises MachineFailed."""
        self.abandon_move()
        try:
            self._next_link = await Link.connect(path, _CONNECT_S)
        except OSError as error:
            raise MachineFailed(
                f"the agent's channel of machine {self.machine}'s successor can't be reached: {error}"
            ) from error

    async def move(self) -> None:
        """The old process is frozen: reads what the guest sent through it, goes over to the successor, and resumes.

        Does not wait for the guest, which may be paused; calls do. Has no point at which a cancellation could tear it.
        """
        if self.state is State.CLOSED:
            raise GuestUnresponsive(f"the channel to machine {self.machine} is closed ({self.reason}): try again")
        if self._next_link is None or self._link is None:
            raise InternalError(f"the channel to {self.machine} was moved without prepare_move")
        old = self._link
        old.read_dry()
        old.close()
        link, self._next_link = self._next_link, None
        if self._is_closed():  # what was read broke the protocol
            link.close()
            raise GuestUnresponsive(f"the channel to machine {self.machine} is closed ({self.reason}): try again")
        self._link, self._link_ended = link, ""
        self._link.start(self._on_data, self._on_end)
        if self.state is State.GREETING:
            self._greet()
            return
        self._resumed.clear()
        self._become(State.RESUMING)
        self._resume()
        self._repeat(self._resume, State.RESUMING)

    def abandon_move(self) -> None:
        """The fork failed: the old process goes on."""
        if self._next_link is not None:
            self._next_link.close()
            self._next_link = None
        if self._link_ended:
            self._on_end(self._link_ended)

    def _is_closed(self) -> bool:
        return self.state is State.CLOSED

    async def resumed(self) -> None:
        """Waits until the guest has answered after a move."""
        await self._resumed.wait()

    # -- calls

    async def exec(self, request: ExecSpec) -> ExecCall:
        """Starts a command; what becomes of it is told by the call's events. Raises InvalidRequest."""
        return ExecCall(self._call(request.pack()))

    async def stat(self, path: str) -> FileStat:
        """What is at an absolute path; links are followed."""
        result = await self._call(wire.pack(("op", "stat"), ("path", _absolute(path)))).finished()
        return FileStat(
            exists=result.get("exists") == "1",
            directory=result.get("directory") == "1",
            size_bytes=int(result.get("size", "0")),
            mode=int(result.get("mode", "0")),
        )

    async def download(self, path: str) -> AsyncIterator[bytes]:
        """A tar stream of a file or a tree; its top entry is named as the path's last component. Raises NotFound."""
        call = self._call(wire.pack(("op", "download"), ("path", _absolute(path))))
        try:
            while (event := await call.next()) is not None:
                data = getattr(event, "data", b"")
                if data:
                    yield data
            call.checked()
        finally:
            call.cancel()

    async def upload(self, directory: str) -> Upload:
        """Begins to unpack a tar stream into an absolute directory, which must be there."""
        return Upload(self._call(wire.pack(("op", "upload"), ("directory", _absolute(directory)))))

    async def sync(self) -> None:
        """Writes the guest's file systems back."""
        await self._call(wire.pack(("op", "sync"))).finished()

    async def poweroff(self) -> None:
        """Asks for a clean shutdown; returns when the guest has begun, not when it is done."""
        await self._call(wire.pack(("op", "poweroff"))).finished()

    async def settle(self, deadline_s: float = _SETTLE_S) -> None:
        """Waits until the agent has nothing left to prepare (modules, network, the root file system's growth), so that
        children of a snapshot taken now have it done. Raises GuestUnresponsive."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._call(wire.pack(("op", "settle"))).finished()
        except TimeoutError as error:
            raise GuestUnresponsive(
                f"machine {self.machine} had not finished its start after {deadline_s:.0f} s: "
                f"see `forky logs {self.machine}`"
            ) from error

    async def quiesce(self, deadline_s: float) -> None:
        """Freezes all of the guest's user processes; returns when none runs any more.

        A child that is split while they are frozen lets them go on by itself, when it has taken on its identity; the
        parent wants `thaw`. A guest that hears nothing for `wire.FROZEN_S` takes itself for a copy, seeds its random
        numbers anew and lets them go on. Raises NotPossibleNow when a process does not stop by the deadline (all go on
        then), GuestUnresponsive when the agent doesn't answer.
        """
        call = self._call(wire.pack(("op", "quiesce"), ("deadline", repr(float(deadline_s)))))
        try:
            async with asyncio.timeout(deadline_s + _QUIESCE_GRACE_S):
                await call.finished()
        except TimeoutError as error:
            raise GuestUnresponsive(
                f"the agent of machine {self.machine} did not say in {deadline_s:.0f} s that the guest stands still: "
                f"see `forky logs {self.machine}`, or fork without --quiesce"
            ) from error
        finally:
            if call.result is None and not self._is_closed():
                self._call(wire.pack(("op", "thaw")))  # in the channel behind the other: nobody waits for it

    async def thaw(self) -> None:
        """Lets the guest's user processes go on, after `quiesce`; nothing happens when they do already."""
        await self._call(wire.pack(("op", "thaw"))).finished()

    async def set_clock(self) -> None:
        """Sets the guest's wall clock to the host's, as after a pause."""
        await self.send_clock().finished()

    def send_clock(self) -> Call:
        """As `set_clock`, without a wait: what is asked of the guest from here on finds the clock set."""
        return self._call(wire.pack(("op", "clock"), ("time-ns", str(time.time_ns()))))

    def _call(self, request: bytes) -> Call:
        if self.state in (State.NEW, State.GREETING, State.CLOSED):
            raise GuestUnresponsive(
                f"the channel to machine {self.machine} is not open ({self.reason or self.state.value}): try again"
            )
        if len(request) > wire.MAX_OPEN:
            raise InvalidRequest("the command and its environment are longer than 2 MiB: pass the data in a file")
        self._last_call += 1
        call = self._calls[self._last_call] = Call(self, self._last_call)
        for at in range(0, len(request), wire.CHUNK):
            part = request[at : at + wire.CHUNK]
            self.send(wire.OPEN, call.id, bytes((at + wire.CHUNK < len(request),)) + part)
        return call

    # -- what calls need

    def send(self, type_: int, call: int, payload: bytes = b"") -> None:
        """Sends a numbered frame; while the channel moves it is kept, and sent when the guest has answered."""
        frame = self._session.seal(type_, call, payload)
        if self.state is State.OPEN and self._link is not None:
            self._link.write(frame)

    async def room(self) -> None:
        """Waits until less than SESSION_WINDOW is unacknowledged."""
        while self._session.full and self.state is not State.CLOSED:
            self._room.clear()
            await self._room.wait()

    def forget(self, call: int) -> None:
        """The call is over."""
        self._calls.pop(call, None)

    # -- the link's side

    def _greet(self) -> None:
        fields: list[tuple[str, str | bytes]] = [("session", self._session_id), ("orphans", self._orphans)]
        if self._identity is not None:
            fields += self._identity.fields(self._session_id)
        self._greeted = time.monotonic()
        self._write(wire.encode(wire.HELLO, self._session.tag, payload=wire.pack(*fields)))

    def _resume(self) -> None:
        self._write(self._session.control(wire.RESUME))

    def _write(self, frame: bytes) -> None:
        if self._link is not None:
            self._link.write(frame)

    def _repeat(self, action: Callable[[], None], state: State) -> None:
        """Repeats while the state lasts; then, while calls wait, asks now and then whether something was lost."""
        if self._repeater is not None:
            self._repeater.cancel()
        self._repeater = asyncio.create_task(self._repeat_forever(action, state), name=f"channel-{self.machine}")

    async def _repeat_forever(self, action: Callable[[], None], state: State) -> None:
        pause_s = _REPEAT_FIRST_S
        while self.state is state:
            await asyncio.sleep(pause_s)
            if self.state is state:
                action()
            pause_s = min(pause_s * 1.5, _REPEAT_MAX_S)
        while self.state is not State.CLOSED:
            await asyncio.sleep(_PROBE_S)
            waiting = bool(self._calls) or self._session.unacknowledged_bytes > 0
            if self.state is State.OPEN and waiting and time.monotonic() - self._heard > _PROBE_S:
                self._resume()

    def _on_end(self, reason: str) -> None:
        if self._next_link is not None:
            # The old process may be gone before `move` is called; the machine goes on in its successor.
            self._link_ended = reason
            return
        self._close(
            reason,
            MachineFailed(
                f"machine {self.machine} went away ({reason}): its QEMU process ended; "
                f"see `forky inspect {self.machine}`"
            ),
        )

    def _on_data(self, data: bytes) -> None:
        self._decoder.feed(data)
        before = self._session.received
        for frame in self._decoder.frames():
            self._on_frame(frame)
            if self.state is State.CLOSED:
                return
        if self._session.received != before:
            self._write(self._session.control(wire.ACK))
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._decoder.stalled:
            loop = asyncio.get_running_loop()
            self._stall = loop.call_later(wire.STALL_S, self._on_stall)

    def _on_stall(self) -> None:
        frame = self._decoder.resynchronise()
        if frame is not None:
            self._on_frame(frame)

    def _on_frame(self, frame: wire.Frame) -> None:
        session = self._session
        if frame.tag != session.tag:
            return  # of an earlier session: it lay in the channel
        self._heard = time.monotonic()
        try:
            if frame.type == wire.WELCOME:
                self._on_welcome(frame)
            elif frame.type == wire.UNKNOWN:
                self._close("the agent was started anew and knows nothing of this session")
            elif self.state is State.GREETING:
                return
            elif frame.type >= wire.OPEN:
                self._on_numbered(frame)
            elif frame.type == wire.ACK:
                session.acknowledge(wire.to_number(frame.payload))
                if not session.full:
                    self._room.set()
            elif frame.type == wire.RESUMED:
                self._on_resumed(wire.to_number(frame.payload))
        except (ValueError, KeyError) as error:
            log.warning("the agent broke the protocol", machine=self.machine, type=frame.type, error=str(error))
            self._close(f"its agent broke the protocol: {error}")

    def _on_numbered(self, frame: wire.Frame) -> None:
        if self._session.accept(frame.sequence):
            call = self._calls.get(frame.call)
            if call is not None:
                call.on_frame(frame)
        elif self._session.gap(frame.sequence):
            self._write(self._session.control(wire.RESUMED))

    def _on_welcome(self, frame: wire.Frame) -> None:
        fields = dict(wire.unpack(frame.payload))
        if self.state is not State.GREETING or wire.text(fields["session"]) != self._session_id:
            return
        if not {"version", "pid", "uptime-ns", "time-ns"} <= fields.keys():
            raise ValueError("a field is missing in the answer to the greeting")
        self._become(State.OPEN)
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_result(fields)

    def _on_resumed(self, last: int) -> None:
        self._session.acknowledge(last)
        if self.state is State.RESUMING:
            self._become(State.OPEN)
        if not self._session.full:
            self._room.set()
        for kept in self._session.replay():
            self._write(kept)
        self._resumed.set()

    def _become(self, state: State) -> None:
        log.debug("channel", machine=self.machine, was=self.state.value, state=state.value)
        self.state = state


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"«{path[:200]}» is not an absolute path: paths in a machine begin with /")
    return path
