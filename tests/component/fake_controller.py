"""A controller for tests of the SDK and the command line: fake behind the wire, everything else is real.

Commands run as real processes on this computer, files lie in a directory, and the socket and the locked pid files are
where the real daemons have them.
"""

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import signal
import struct
import tarfile
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from forkypig import errors, model
from forkypig.daemon.server import PidFile
from forkypig.sdk import local
from forkypig.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    common_pb2,
    controller_pb2_grpc,
    observe_pb2_grpc,
)
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire import convert, status
from tests.component.fake_observation import Observation


def _expires_us(ttl_s: float) -> int:
    """Of a lease that begins now, if any is asked for."""
    return round((time.time() + ttl_s) * 1e6) if ttl_s else 0


class Controller(controller_pb2_grpc.ControllerServicer):
    """Machines that are rows in a dictionary."""

    def __init__(self) -> None:
        self.machines: dict[str, model.Machine] = {}
        self.snapshots: dict[str, model.Snapshot] = {}
        self.images: dict[str, model.Image] = {}
        self.events: list[model.Event] = []
        self.ran: list[pb.RunMachineRequest] = []
        self.clock = 1_000_000

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def add_machine(self, name: str, **fields: Any) -> model.Machine:
        machine = model.Machine(
            id=model.new_machine_id(),
            name=name,
            state=fields.pop("state", model.MachineState.RUNNING),
            image=model.ImageId("i-0123456789ab"),
            image_name="debian-12",
            shape=fields.pop("shape", model.Shape()),
            qemu_pid=4242,
            accelerator="tcg",
            accelerator_reason="no KVM",
            created_us=self.now(),
            **fields,
        )
        self.machines[machine.id] = machine
        return machine

    def add_snapshot(self, machine: model.Machine, **fields: Any) -> model.Snapshot:
        snapshot = model.Snapshot(
            id=model.new_snapshot_id(),
            kind=fields.pop("kind", model.SnapshotKind.FORK),
            parent=machine.snapshot,
            machine=machine.id,
            image=machine.image,
            shape=machine.shape,
            machine_type="pc-q35-7.2",
            qemu_build="7.2",
            accelerator="tcg",
            cpu_model="qemu64",
            pause_ms=12.5,
            created_us=self.now(),
            **fields,
        )
        self.snapshots[snapshot.id] = snapshot
        return snapshot

    def find(self, name: str) -> model.Machine:
        for machine in self.machines.values():
            if name in (machine.id, machine.name):
                return machine
        raise errors.NotFound("machine", name)

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        pid = os.getpid()
        return pb.GetStatusResponse(
            controller=common_pb2.Daemon(pid=pid, version="0.1.0", started_us=1),
            pager=common_pb2.Daemon(pid=pid),
            hostd_error="hostd sleeps",
            accelerator="tcg",
            accelerator_reason="no KVM",
            machines=len(self.machines),
        )

    async def Doctor(self, request: Any, context: Any) -> pb.DoctorResponse:  # noqa: N802
        check = common_pb2.Check
        return pb.DoctorResponse(
            checks=[
                check(name="qemu", verdict=check.VERDICT_OK, detail="QEMU 7.2"),
                check(name="fuse", verdict=check.VERDICT_FAILED, detail="no /dev/fuse", remedy="modprobe fuse"),
            ]
        )

    async def RunMachine(self, request: Any, context: Any) -> AsyncIterator[pb.RunMachineResponse]:  # noqa: N802
        self.ran.append(request)
        yield pb.RunMachineResponse(progress=common_pb2.Progress(step="booting", done=1, total=2))
        if any(machine.name == request.name for machine in self.machines.values()):
            await status.abort(context, errors.AlreadyExists("machine", request.name))
        shape = model.Shape(request.shape.cpus or 1, request.shape.memory_mib or 512, request.shape.disk_mib or 4096)
        machine = self.add_machine(request.name or "brave-pig", shape=shape, expires_us=_expires_us(request.ttl_s))
        yield pb.RunMachineResponse(result=pb.RunResult(machine=convert.machine_to_wire(machine), ready_ms=41.5))

    async def Fork(self, request: Any, context: Any) -> common_pb2.ForkResult:  # noqa: N802
        try:
            parent = self.find(request.source)
        except errors.NotFound as error:
            await status.abort(context, error)
        snapshot = self.add_snapshot(parent)
        children = [
            self.add_machine(
                f"{request.name_prefix or parent.name}-{n}",
                snapshot=snapshot.id,
                parent=parent.id,
                expires_us=_expires_us(request.ttl_s),
            )
            for n in range(1, request.count + 1)
        ]
        result = model.ForkResult(
            snapshot=snapshot,
            parent=parent.id,
            pause_ms=12.5,
            children=tuple(model.Child(child, 33.25) for child in children),
        )
        return convert.fork_result_to_wire(result)

    async def TakeSnapshot(self, request: Any, context: Any) -> common_pb2.Snapshot:  # noqa: N802
        kept = self.add_snapshot(self.find(request.machine), tag=request.tag, kind=model.SnapshotKind.KEPT)
        return convert.snapshot_to_wire(kept)

    async def GetMachine(self, request: Any, context: Any) -> common_pb2.Machine:  # noqa: N802
        try:
            return convert.machine_to_wire(self.find(request.machine))
        except errors.NotFound as error:
            await status.abort(context, error)

    async def ListMachines(self, request: Any, context: Any) -> pb.ListMachinesResponse:  # noqa: N802
        return pb.ListMachinesResponse(machines=map(convert.machine_to_wire, self.machines.values()))

    async def PauseMachine(self, request: Any, context: Any) -> common_pb2.Machine:  # noqa: N802
        await status.abort(context, errors.Busy(f"machine {self.find(request.machine).name}", "forking"))

    async def RemoveMachine(self, request: Any, context: Any) -> common_pb2.Empty:  # noqa: N802
        del self.machines[self.find(request.machine).id]
        return common_pb2.Empty()

    async def ReadConsole(self, request: Any, context: Any) -> AsyncIterator[pb.ConsoleChunk]:  # noqa: N802
        yield pb.ConsoleChunk(data=b"Linux version 6.1\n")
        yield pb.ConsoleChunk(data=b"login: \xff\n")

    async def ListSnapshots(self, request: Any, context: Any) -> pb.ListSnapshotsResponse:  # noqa: N802
        return pb.ListSnapshotsResponse(snapshots=map(convert.snapshot_to_wire, self.snapshots.values()))

    async def GetSnapshot(self, request: Any, context: Any) -> common_pb2.Snapshot:  # noqa: N802
        for snapshot in self.snapshots.values():
            if request.snapshot in (snapshot.id, snapshot.tag):
                return convert.snapshot_to_wire(snapshot)
        return await status.abort(context, errors.NotFound("snapshot", request.snapshot))

    async def RemoveSnapshot(self, request: Any, context: Any) -> common_pb2.Empty:  # noqa: N802
        del self.snapshots[request.snapshot]
        return common_pb2.Empty()

    async def ListEvents(self, request: Any, context: Any) -> pb.ListEventsResponse:  # noqa: N802
        later = [event for event in self.events if event.sequence > request.after_sequence]
        return pb.ListEventsResponse(events=map(convert.event_to_wire, later[: request.limit or 1000]))

    async def ListImages(self, request: Any, context: Any) -> pb.ListImagesResponse:  # noqa: N802
        return pb.ListImagesResponse(images=map(convert.image_to_wire, self.images.values()))


class Agent(agent_pb2_grpc.AgentServicer):
    """A guest whose root is a directory, and whose commands are processes of this computer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archives: dict[str, bytes] = {}  # what Download sends for a path instead of what is there
        self.ended: list[int] = []  # pids of commands whose caller went away

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    async def Exec(self, request_iterator: Any, context: Any) -> AsyncIterator[agent_pb2.ExecResponse]:  # noqa: N802
        start = (await anext(request_iterator)).start
        if start.argv[0] == "hang-agent":
            await status.abort(context, errors.GuestUnresponsive("the agent of web does not answer: see its console"))
        primary, secondary = pty.openpty() if start.HasField("terminal") else (-1, -1)
        if primary >= 0:
            _set_size(primary, start.terminal)
        own = secondary if secondary >= 0 else asyncio.subprocess.PIPE
        try:
            child = await asyncio.create_subprocess_exec(
                *start.argv,
                stdin=own if start.stdin else asyncio.subprocess.DEVNULL,
                stdout=own,
                stderr=own,
                cwd=start.directory or self.root,
                env={**os.environ, **start.environment},
                start_new_session=True,
            )
        except FileNotFoundError:
            yield agent_pb2.ExecResponse(exit=agent_pb2.ExecExit(code=127, failure="no such program"))
            return
        if secondary >= 0:
            os.close(secondary)
        yield agent_pb2.ExecResponse(started=agent_pb2.ExecStarted(pid=child.pid))
        feeder = asyncio.create_task(_feed(child, primary, request_iterator))
        timed_out = False
        try:
            async with asyncio.timeout(start.timeout_s or None):
                async for response in _output(child, primary):
                    yield response
                await child.wait()
        except TimeoutError:
            timed_out = True
        finally:
            feeder.cancel()
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                if not timed_out:
                    self.ended.append(child.pid)
            if primary >= 0:
                os.close(primary)
        code = child.returncode if child.returncode is not None else await child.wait()
        code = 124 if timed_out else 128 - code if code < 0 else code
        yield agent_pb2.ExecResponse(exit=agent_pb2.ExecExit(code=code, timed_out=timed_out))

    async def StatPath(self, request: Any, context: Any) -> agent_pb2.StatPathResponse:  # noqa: N802
        path = self.inside(request.path)
        if request.path in self.archives:
            return agent_pb2.StatPathResponse(exists=True, directory=True)
        if not path.exists():
            return agent_pb2.StatPathResponse()
        return agent_pb2.StatPathResponse(exists=True, directory=path.is_dir(), size_bytes=path.stat().st_size)

    async def Download(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.DownloadResponse]:  # noqa: N802
        data = self.archives.get(request.path)
        if data is None:
            path = self.inside(request.path)
            if not path.exists():
                await status.abort(context, errors.NotFound("file", request.path))
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w") as tar:
                tar.add(path, arcname=path.name)
            data = made.getvalue()
        for at in range(0, len(data), 10_000):  # not a multiple of a tar block
            yield agent_pb2.DownloadResponse(data=data[at : at + 10_000])

    async def Upload(self, request_iterator: Any, context: Any) -> agent_pb2.UploadResponse:  # noqa: N802
        start = (await anext(request_iterator)).start
        directory = self.inside(start.directory)
        if not directory.is_dir():
            await status.abort(context, errors.NotFound("directory", start.directory))
        made = io.BytesIO()
        async for request in request_iterator:
            made.write(request.data)
        if not made.tell():
            await status.abort(context, errors.InvalidRequest("an empty archive"))
        made.seek(0)
        with tarfile.open(fileobj=made) as tar:
            entries = tar.getmembers()
            tar.extractall(directory)
        files = [entry for entry in entries if entry.isreg()]
        return agent_pb2.UploadResponse(files=len(files), bytes=sum(entry.size for entry in files))


def _set_size(fd: int, size: agent_pb2.TerminalSize) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


async def _feed(child: asyncio.subprocess.Process, primary: int, requests: AsyncIterator[Any]) -> None:
    async for request in requests:
        match request.WhichOneof("request"):
            case "stdin" if primary >= 0:
                os.write(primary, request.stdin)
            case "stdin" if child.stdin is not None:
                child.stdin.write(request.stdin)
                await child.stdin.drain()
            case "stdin_closed" if child.stdin is not None:
                child.stdin.close()
            case "resize":
                _set_size(primary, request.resize)
            case "signal":
                os.killpg(child.pid, request.signal)


async def _output(child: asyncio.subprocess.Process, primary: int) -> AsyncIterator[agent_pb2.ExecResponse]:
    if primary >= 0:
        with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
            while data := await asyncio.to_thread(os.read, primary, 65536):
                yield agent_pb2.ExecResponse(stdout=data)
        return
    queue: asyncio.Queue[agent_pb2.ExecResponse | None] = asyncio.Queue(maxsize=4)

    async def drain(stream: asyncio.StreamReader, name: str) -> None:
        while data := await stream.read(65536):
            await queue.put(agent_pb2.ExecResponse(**{name: data}))

    async def both() -> None:
        assert child.stdout is not None
        assert child.stderr is not None
        await asyncio.gather(drain(child.stdout, "stdout"), drain(child.stderr, "stderr"))
        await queue.put(None)

    draining = asyncio.create_task(both())
    try:
        while (response := await queue.get()) is not None:
            yield response
    finally:
        draining.cancel()


class Instance:
    """A home with a fake controller in it, and pid files that say that all daemons run."""

    def __init__(self, home: Path) -> None:
        self.place = local.place(home)
        self.controller = Controller()
        self.observation = Observation(self.controller)
        self.root = home / "guest"
        self.agent = Agent(self.root)
        self.server: grpc.aio.Server | None = None
        self.pid_files: list[PidFile] = []

    @property
    def home(self) -> Path:
        return self.place.home

    async def start(self) -> None:
        local.make_home(self.place)
        (self.root / "root").mkdir(parents=True)
        (self.root / "tmp").mkdir()
        self.pid_files = [PidFile(self.place.pid_file(daemon)) for daemon in local.DAEMONS]
        self.server = grpc.aio.server()
        controller_pb2_grpc.add_ControllerServicer_to_server(self.controller, self.server)
        agent_pb2_grpc.add_AgentServicer_to_server(self.agent, self.server)
        observe_pb2_grpc.add_ObservationServicer_to_server(self.observation, self.server)
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, self.server)
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        self.server.add_insecure_port(f"unix:{self.place.socket('controller')}")
        await self.server.start()

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.stop(None)
        for pid_file in self.pid_files:
            os.close(pid_file._fd)
