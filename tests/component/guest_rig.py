"""The real agent on a socket, and a port between it and the channel that is what QEMU's is: it moves, tears, loses."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from forkypig.agent import agent as wire
from forkypig.guest.calls import ExecSpec, Exited, Output
from forkypig.guest.channel import AgentInfo, GuestChannel, Identity

ME = Identity(hostname="child-1", machine_id="0123456789abcdef" * 2)


class Port:
    """QEMU's part: one connection to the guest for good, and a socket for the host that can be put elsewhere.

    After `freeze` nothing is read from the host any more, as with a stopped process; `thaw` puts a new socket in its
    place. What the host wrote and was not read by then is lost; what the guest wrote is not.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.guest_reader: asyncio.StreamReader
        self.guest_writer: asyncio.StreamWriter
        self.host: asyncio.StreamWriter | None = None
        self.pumps: list[asyncio.Task[None]] = []
        self.server: asyncio.Server
        self.connected = asyncio.Event()
        self.sockets = 0
        self.to_guest = self.to_host = 0

    async def listen(self) -> Path:
        """A new socket for the host, as a shell has before it is loaded."""
        self.sockets += 1
        path = self.directory / f"host-{self.sockets}.sock"
        self.connected = asyncio.Event()
        self.server = await asyncio.start_unix_server(self._accept, path)
        return path

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.incoming = (reader, writer)
        self.connected.set()

    async def run(self) -> None:
        """The process that has the last socket runs."""
        await self.connected.wait()
        reader, self.host = self.incoming
        self.pumps = [asyncio.create_task(self._to_guest(reader)), asyncio.create_task(self._to_host())]

    async def _to_guest(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(4096):
            self.to_guest += len(data)
            self.guest_writer.write(data)
            await self.guest_writer.drain()

    async def _to_host(self) -> None:
        assert self.host is not None
        while data := await self.guest_reader.read(4096):
            self.to_host += len(data)
            self.host.write(data)
            await self.host.drain()

    async def freeze(self) -> None:
        for pump in self.pumps:
            pump.cancel()
        await asyncio.gather(*self.pumps, return_exceptions=True)
        self.pumps = []

    async def close(self) -> None:
        await self.freeze()
        for writer in (self.host, self.guest_writer):
            if writer is not None:
                writer.close()


class Guest:
    """An agent, its port, and a channel that is open."""

    def __init__(self, port: Port, channel: GuestChannel, root: Path, process: subprocess.Popen[bytes]) -> None:
        self.port, self.channel, self.root, self.process = port, channel, root, process

    async def move(self) -> None:
        """A split of the machine, as hostd does it."""
        path = await self.port.listen()
        await self.channel.prepare_move(path)
        await self.port.freeze()
        await self.port.run()
        await self.channel.move()

    async def reopen(self, orphans: str, identity: Identity | None = None, deadline_s: float = 30) -> AgentInfo:
        """Another hostd, or a fork's child: a new session with the same agent, while the old one's bytes lie about."""
        path = await self.port.listen()
        await self.port.freeze()
        await self.channel.close()
        self.channel = GuestChannel("m-test")
        await self.channel.connect(path, identity=identity, orphans=orphans)  # type: ignore[arg-type]
        await self.port.run()
        return await self.channel.answered(deadline_s)


@contextlib.asynccontextmanager
async def started(
    directory: Path,
    skip: str = "clock,kernel-hostname,neighbours",
    *,
    wrapper: Sequence[str] = (),
    options: Sequence[str] = (),
    settings: str = "",
) -> AsyncIterator[Guest]:
    """An agent and its port. `wrapper`: a command that runs it; `settings`: Python that changes its constants."""
    root = directory / "root"
    for name in ("etc", "run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    path = directory / "agent.sock"
    code = f"import sys; sys.path.insert(0, {str(Path(wire.__file__).parent)!r}); import agent; {settings or 'pass'}; "
    arguments = [*wrapper, sys.executable, "-I", "-S", "-B", "-c", code + "agent.main(sys.argv[1:])"]
    process = subprocess.Popen([*arguments, "--socket", str(path), "--root", str(root), "--skip", skip, *options])
    port = Port(directory)
    guest = Guest(port, GuestChannel("m-test"), root, process)
    try:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                port.guest_reader, port.guest_writer = await asyncio.open_unix_connection(path)
                break
            assert process.poll() is None
            await asyncio.sleep(0.01)
        yield guest
    finally:
        await guest.channel.close()
        await port.close()
        process.kill()
        process.wait()


async def greeted(guest: Guest) -> Guest:
    """With a first session, as a machine has that was booted."""
    host = await guest.port.listen()
    await guest.channel.connect(host, identity=None, orphans="run")
    await guest.port.run()
    await guest.channel.answered(30)
    return guest


async def run(guest: Guest, *argv: str, **more: object) -> tuple[bytes, bytes, Exited]:
    call = await guest.channel.exec(ExecSpec(argv=argv, **more))  # type: ignore[arg-type]
    out = {1: b"", 2: b""}
    async for event in call:
        if isinstance(event, Output):
            out[event.fd] += event.data
        elif isinstance(event, Exited):
            return out[1], out[2], event
    raise AssertionError("no exit")
