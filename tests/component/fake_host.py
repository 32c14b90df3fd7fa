"""A host that runs no machines: hostd's services on a real Unix socket, with the state in dictionaries.

A test can have any method fail (`fail`), stand still (`stall`), or lose machines and snapshots, and can read from
`calls` what it was asked.
"""

# gRPC names a servicer's methods as the .proto does.
# ruff: noqa: N802

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from forkypig.errors import ForkyError, NotFound
from forkypig.hostd.fences import FenceInterceptor, Fences
from forkypig.v1 import agent_pb2, agent_pb2_grpc, host_pb2_grpc, observe_pb2_grpc
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import host_pb2 as pb
from forkypig.wire.status import abort
from tests.component.fake_observation import HostObservation

IMAGE = common.Image(id="i-0123456789ab", name="debian-12", size_bytes=180 << 20, kernel="6.1.0", sha256="ab" * 32)
RUNNING, PAUSED = common.MACHINE_STATE_RUNNING, common.MACHINE_STATE_PAUSED
HIBERNATED = common.MACHINE_STATE_HIBERNATED
STOPPED, FAILED, CREATING = common.MACHINE_STATE_STOPPED, common.MACHINE_STATE_FAILED, common.MACHINE_STATE_CREATING


class Stall:
    """A method that stands still: `reached` when it was called, until `go` is set."""

    def __init__(self) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()


class FakeHost(host_pb2_grpc.HostServicer, agent_pb2_grpc.AgentServicer):
    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.machines: dict[str, common.Machine] = {}
        self.snapshots: dict[str, common.Snapshot] = {}
        self.images: dict[str, common.Image] = {IMAGE.id: IMAGE}
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.failures: dict[str, list[ForkyError]] = defaultdict(list)
        self.stalls: dict[str, Stall] = {}
        self.qemu_build, self.accelerator, self.memory_total_mib = "qemu 7.2 build 1", "tcg", 16_384
        self.exec_ended = asyncio.Event()
        self.ksm = common.KsmStatus()
        self.pressure = pb.HostPressure(memory_total_mib=16_384, memory_available_mib=12_000)
        self.chunks_taken = 0
        self._watchers: set[asyncio.Queue[common.Machine]] = set()
        self._server: grpc.aio.Server | None = None
        self._pid = 1000

    # -- what tests do -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.fences = Fences(self.socket.with_name("fences.json"))
        self._server = grpc.aio.server(interceptors=[FenceInterceptor(self.fences)])
        host_pb2_grpc.add_HostServicer_to_server(self, self._server)
        agent_pb2_grpc.add_AgentServicer_to_server(self, self._server)
        observe_pb2_grpc.add_HostObservationServicer_to_server(HostObservation(self), self._server)
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def fail(self, method: str, error: ForkyError) -> None:
        """The next call of `method` raises `error`."""
        self.failures[method].append(error)

    def stall(self, method: str) -> Stall:
        """Calls of `method` stand still before they do anything."""
        self.stalls[method] = Stall()
        return self.stalls[method]

    def change(self, machine: str, **fields: Any) -> None:
        """Something happens to a machine; the watchers are told."""
        for name, value in fields.items():
            setattr(self.machines[machine], name, value)
        self._tell(self.machines[machine])

    def _tell(self, machine: common.Machine) -> None:
        told = common.Machine()
        told.CopyFrom(machine)
        for watcher in self._watchers:
            watcher.put_nowait(told)

    async def _enter(self, method: str, request: Any) -> None:
        self.calls[method].append(request)
        if (stall := self.stalls.get(method)) is not None:
            stall.reached.set()
            await stall.go.wait()
        if self.failures[method]:
            raise self.failures[method].pop(0)

    def _snapshot(self, snapshot: str, kind: Any, **fields: Any) -> common.Snapshot:
        made = common.Snapshot(
            id=snapshot,
            kind=kind,
            machine_type="pc-q35-7.2",
            qemu_build=self.qemu_build,
            accelerator=self.accelerator,
            cpu_model="max",
            **fields,
        )
        return self.snapshots.setdefault(snapshot, made)

    def _machine(self, machine: str, name: str, state: Any, **fields: Any) -> common.Machine:
        self._pid += 1
        made = common.Machine(
            id=machine, name=name, state=state, qemu_pid=self._pid, accelerator=self.accelerator, **fields
        )
        made = self.machines.setdefault(machine, made)
        self._tell(made)
        return made

    # -- Host ----------------------------------------------------------------------------------------------------------

    async def GetHostStatus(self, request: common.Empty, context: Any) -> pb.HostStatus:
        return await self._answer("GetHostStatus", request, context)

    async def _do_GetHostStatus(self, _request: Any) -> pb.HostStatus:
        return pb.HostStatus(
            hostd=common.Daemon(pid=4711),
            accelerator=self.accelerator,
            accelerator_reason="told so",
            qemu_version="7.2",
            qemu_build=self.qemu_build,
            memory_total_mib=self.memory_total_mib,
        )

    async def GetKsm(self, request: common.Empty, context: Any) -> common.KsmStatus:
        return await self._answer("GetKsm", request, context)

    async def _do_GetKsm(self, _request: Any) -> common.KsmStatus:
        return self.ksm

    async def SetKsm(self, request: pb.HostSetKsmRequest, context: Any) -> common.KsmStatus:
        return await self._answer("SetKsm", request, context)

    async def _do_SetKsm(self, request: pb.HostSetKsmRequest) -> common.KsmStatus:
        self.ksm = common.KsmStatus(running=bool(request.tenants), tenants=request.tenants)
        return self.ksm

    async def GetPressure(self, request: common.Empty, context: Any) -> pb.HostPressure:
        return await self._answer("GetPressure", request, context)

    async def _do_GetPressure(self, _request: Any) -> pb.HostPressure:
        return self.pressure

    async def _answer(self, method: str, request: Any, context: Any) -> Any:
        try:
            await self._enter(method, request)
            return await getattr(self, f"_do_{method}")(request)
        except ForkyError as error:
            await abort(context, error)

    async def Fence(self, request: pb.FenceRequest, context: Any) -> common.Empty:
        self.calls["Fence"].append(request)
        await self.fences.raise_to(request.controller, request.number)
        return common.Empty()

    async def Doctor(self, request: Any, context: Any) -> pb.HostDoctorResponse:
        check = common.Check(name="QEMU", verdict=common.Check.VERDICT_OK, detail="7.2")
        return pb.HostDoctorResponse(checks=[check])

    async def BootMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("BootMachine", request, context)

    async def _do_BootMachine(self, request: pb.BootMachineRequest) -> common.Machine:
        return self._machine(
            request.machine,
            request.name,
            RUNNING,
            image=request.image,
            shape=request.shape,
            config=request.config,
            tenant=request.tenant,
        )

    async def MakeTemplate(self, request: Any, context: Any) -> common.Snapshot:
        return await self._answer("MakeTemplate", request, context)

    async def _do_MakeTemplate(self, request: pb.MakeTemplateRequest) -> common.Snapshot:
        kind = common.SNAPSHOT_KIND_TEMPLATE
        return self._snapshot(request.snapshot, kind, image=request.image, shape=request.shape, tenant=request.tenant)

    async def ForkMachine(self, request: Any, context: Any) -> common.ForkResult:
        return await self._answer("ForkMachine", request, context)

    async def _do_ForkMachine(self, request: pb.ForkMachineRequest) -> common.ForkResult:
        source = self.machines.get(request.machine)
        if source is None:
            raise NotFound("machine", request.machine)
        made = self._snapshot(
            request.snapshot,
            request.kind,
            tag=request.tag,
            message=request.message,
            parent=source.snapshot,
            machine=source.id,
            image=source.image,
            shape=source.shape,
            pause_ms=12.5,
            tenant=source.tenant,
        )
        self._pid += 1
        self.change(source.id, snapshot=made.id, qemu_pid=self._pid)
        # As the real one does: the machine has split whether or not its children come to life.
        if self.failures["children"]:
            raise self.failures["children"].pop(0)
        return self._fork(made, request)

    async def ForkSnapshot(self, request: Any, context: Any) -> common.ForkResult:
        return await self._answer("ForkSnapshot", request, context)

    async def _do_ForkSnapshot(self, request: pb.ForkSnapshotRequest) -> common.ForkResult:
        snapshot = self.snapshots.get(request.snapshot)
        if snapshot is None:
            raise NotFound("snapshot", request.snapshot)
        return self._fork(snapshot, request)

    def _fork(self, snapshot: common.Snapshot, request: Any) -> common.ForkResult:
        children = [
            common.Child(
                machine=self._machine(
                    child.machine,
                    child.name,
                    PAUSED if request.options.paused else RUNNING,
                    image=snapshot.image,
                    shape=snapshot.shape,
                    snapshot=snapshot.id,
                    parent=snapshot.machine if snapshot.tenant == child.tenant else "",
                    config=child.config,
                    tenant=child.tenant,
                ),
                ready_ms=40.0,
            )
            for child in request.children
        ]
        return common.ForkResult(snapshot=snapshot, parent=snapshot.machine, pause_ms=12.5, children=children)

    async def PauseMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("PauseMachine", request, context)

    async def _do_PauseMachine(self, request: Any) -> common.Machine:
        self.change(request.machine, state=PAUSED)
        return self.machines[request.machine]

    async def ResumeMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("ResumeMachine", request, context)

    async def _do_ResumeMachine(self, request: Any) -> common.Machine:
        self.change(request.machine, state=RUNNING)
        return self.machines[request.machine]

    async def AcquireMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("AcquireMachine", request, context)

    async def _do_AcquireMachine(self, request: Any) -> common.Machine:
        if request.machine not in self.machines:
            raise NotFound("machine", request.machine)
        change = {"name": request.name} if request.name else {}
        self.change(request.machine, state=RUNNING, **change)
        return self.machines[request.machine]

    async def StopMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("StopMachine", request, context)

    async def _do_StopMachine(self, request: Any) -> common.Machine:
        self.change(request.machine, state=STOPPED, qemu_pid=0)
        return self.machines[request.machine]

    async def StartMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("StartMachine", request, context)

    async def _do_StartMachine(self, request: Any) -> common.Machine:
        self.change(request.machine, state=RUNNING, qemu_pid=99)
        return self.machines[request.machine]

    async def RestoreMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("RestoreMachine", request, context)

    async def _do_RestoreMachine(self, request: pb.HostRestoreMachineRequest) -> common.Machine:
        if request.snapshot not in self.snapshots:
            raise NotFound("snapshot", request.snapshot)
        self.change(request.machine, state=RUNNING, qemu_pid=77, snapshot=request.snapshot)
        return self.machines[request.machine]

    async def HibernateMachine(self, request: Any, context: Any) -> AsyncIterator[pb.HostMachineUpdate]:
        try:
            await self._enter("HibernateMachine", request)
            yield pb.HostMachineUpdate(progress=common.Progress(step="packing", done=1, total=2))
            machine = self.machines[request.machine]
            if machine.state != HIBERNATED:
                fields = {"parent": machine.snapshot, "machine": machine.id, "packed": True}
                kind = common.SNAPSHOT_KIND_HIBERNATION
                self._snapshot(request.snapshot, kind, image=machine.image, shape=machine.shape, **fields)
                self.change(machine.id, state=HIBERNATED, qemu_pid=0, snapshot=request.snapshot)
            yield pb.HostMachineUpdate(machine=self.machines[request.machine])
        except ForkyError as error:
            await abort(context, error)

    async def WakeMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("WakeMachine", request, context)

    async def _do_WakeMachine(self, request: Any) -> common.Machine:
        self.change(request.machine, state=RUNNING, qemu_pid=78)
        return self.machines[request.machine]

    async def LabelSnapshot(self, request: Any, context: Any) -> common.Snapshot:
        return await self._answer("LabelSnapshot", request, context)

    async def _do_LabelSnapshot(self, request: pb.HostLabelSnapshotRequest) -> common.Snapshot:
        snapshot = self.snapshots[request.snapshot]
        snapshot.kind, snapshot.tag, snapshot.message = request.kind, request.tag, request.message
        return snapshot

    async def ConfigureMachine(self, request: Any, context: Any) -> common.Machine:
        return await self._answer("ConfigureMachine", request, context)

    async def _do_ConfigureMachine(self, request: Any) -> common.Machine:
        self.machines[request.machine].config.CopyFrom(request.config)
        self._tell(self.machines[request.machine])
        return self.machines[request.machine]

    async def RemoveMachine(self, request: Any, context: Any) -> common.Empty:
        return await self._answer("RemoveMachine", request, context)

    async def _do_RemoveMachine(self, request: Any) -> common.Empty:
        if (machine := self.machines.pop(request.machine, None)) is not None:
            gone = common.Machine()
            gone.CopyFrom(machine)
            gone.state = common.MACHINE_STATE_REMOVING
            self._tell(gone)
        return common.Empty()

    async def ListMachines(self, request: Any, context: Any) -> pb.HostListMachinesResponse:
        return pb.HostListMachinesResponse(machines=self.machines.values())

    async def ListSnapshots(self, request: Any, context: Any) -> pb.HostListSnapshotsResponse:
        return pb.HostListSnapshotsResponse(snapshots=self.snapshots.values())

    async def RemoveSnapshot(self, request: Any, context: Any) -> common.Empty:
        return await self._answer("RemoveSnapshot", request, context)

    async def _do_RemoveSnapshot(self, request: Any) -> common.Empty:
        assert not any(m.snapshot == request.snapshot for m in self.machines.values()), "a machine stands on it"
        assert not any(s.parent == request.snapshot for s in self.snapshots.values()), "a snapshot stands on it"
        self.snapshots.pop(request.snapshot, None)
        return common.Empty()

    async def BuildImage(self, request: Any, context: Any) -> AsyncIterator[pb.HostBuildImageResponse]:
        try:
            await self._enter("BuildImage", request)
        except ForkyError as error:
            await abort(context, error)
        yield pb.HostBuildImageResponse(progress=common.Progress(step="unpacking", done=1, total=2))
        self.images[IMAGE.id] = IMAGE
        yield pb.HostBuildImageResponse(image=IMAGE)

    async def ListImages(self, request: Any, context: Any) -> pb.HostListImagesResponse:
        return pb.HostListImagesResponse(images=self.images.values())

    async def UpdateImage(self, request: Any, context: Any) -> common.Image:
        made = common.Image()
        made.CopyFrom(self.images[request.image])
        made.ClearField("forget_files")
        made.forget_files.extend(request.forget_files)
        self.images[request.image] = made
        return made

    async def RemoveImage(self, request: Any, context: Any) -> common.Empty:
        self.images.pop(request.image, None)
        return common.Empty()

    async def WatchMachines(self, request: Any, context: Any) -> AsyncIterator[common.Machine]:
        queue: asyncio.Queue[common.Machine] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for machine in list(self.machines.values()):
                yield machine
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def ReadConsole(self, request: Any, context: Any) -> AsyncIterator[pb.HostConsoleChunk]:
        yield pb.HostConsoleChunk(data=b"console of ")
        yield pb.HostConsoleChunk(data=request.machine.encode())

    # -- Agent: a command that says back what it is told ---------------------------------------------------------------

    async def Exec(self, request_iterator: Any, context: Any) -> AsyncIterator[agent_pb2.ExecResponse]:
        try:
            first = await anext(request_iterator)
            self.calls["Exec"].append(first)
            try:
                await self._enter("exec", first)
            except ForkyError as error:
                await abort(context, error)
            yield agent_pb2.ExecResponse(started=agent_pb2.ExecStarted(pid=7))
            async for request in request_iterator:
                if request.HasField("stdin"):
                    yield agent_pb2.ExecResponse(stdout=request.stdin)
            yield agent_pb2.ExecResponse(exit=agent_pb2.ExecExit(code=3))
        finally:
            self.exec_ended.set()

    async def Upload(self, request_iterator: Any, context: Any) -> agent_pb2.UploadResponse:
        size = 0
        async for request in request_iterator:
            size += len(request.data)
        return agent_pb2.UploadResponse(files=1, bytes=size)

    async def Download(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.DownloadResponse]:
        for _ in range(2000):
            yield agent_pb2.DownloadResponse(data=bytes(65536))
            self.chunks_taken += 1

    async def StatPath(self, request: Any, context: Any) -> agent_pb2.StatPathResponse:
        return agent_pb2.StatPathResponse(exists=True, size_bytes=len(request.machine))
