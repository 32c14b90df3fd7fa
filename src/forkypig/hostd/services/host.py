"""hostd's gRPC face: checks what enters, runs the operation, answers in protobuf.

An operation runs in a task of its own and goes on to its end when the caller goes away: half a fork helps nobody, and
a caller that asks again with the same ids gets what was made.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import structlog

from forkypig.daemon.server import daemon_message
from forkypig.errors import AlreadyExists, ForkyError, InvalidRequest
from forkypig.hostd import (
    acquire,
    boot,
    children,
    comparison,
    fork,
    hibernation,
    lifecycle,
    packing,
    pressure,
    restore,
    shutdown,
)
from forkypig.hostd.children import NewChild
from forkypig.hostd.console import read_console
from forkypig.hostd.doctor import doctor
from forkypig.hostd.fences import Fences
from forkypig.hostd.host import Host
from forkypig.hostd.new_snapshot import NewSnapshot
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.images import debian
from forkypig.model import Child, ForkResult, ImageId, MachineId, MachineState, Progress, SnapshotId, check_name
from forkypig.model.access import DEFAULT_TENANT
from forkypig.model.ids import check_id
from forkypig.v1 import common_pb2 as pb
from forkypig.v1 import host_pb2 as host_pb
from forkypig.v1 import host_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.config import config_from_wire, options_from_wire
from forkypig.wire.edge import answered, streamed

log = structlog.get_logger()
_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]


class HostServicer(host_pb2_grpc.HostServicer):
    """forkypig.v1.Host."""

    def __init__(self, host: Host, started_us: int, fences: Fences) -> None:
        self._host, self._started_us, self._fences = host, started_us, fences

    async def _to_the_end(self, name: str, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work` to its end, though the caller may go away before."""
        task = asyncio.create_task(work, name=name)
        self._host.keep(task)
        return await asyncio.shield(task)

    # -- the host ------------------------------------------------------------------------------------------------

    @answered
    async def Fence(self, request: host_pb.FenceRequest, context: _Context) -> pb.Empty:
        await self._fences.raise_to(request.controller, request.number)
        return pb.Empty()

    @answered
    async def GetHostStatus(self, request: pb.Empty, context: _Context) -> host_pb.HostStatus:
        status = host_pb.HostStatus(hostd=daemon_message(self._started_us))
        host = self._host
        try:
            pager = await host.pager.status()
            status.pager.CopyFrom(pager.pager)
            frozen = (each.own_bytes for each in pager.snapshots if each.state == each.STATE_FROZEN)
            status.tiers.CopyFrom(
                pb.MemoryTiers(
                    frozen_bytes=sum(frozen),
                    cached_bytes=pager.cached_bytes,
                    stored_bytes=pager.stored_bytes,
                    chunks=pager.chunks,
                )
            )
        except ForkyError as error:
            status.pager_error = str(error)
        if host.usable:
            status.accelerator, status.accelerator_reason = host.accelerator.name, host.accelerator.reason
            status.qemu_version, status.qemu_build = host.build.version_text, host.build.build_id
        status.network, status.network_reason = host.network.kind, host.network.reason
        memory = await asyncio.to_thread(pressure.measure, host.memory_groups)
        status.memory_total_mib, status.memory_available_mib = memory.total_mib, memory.available_mib
        status.disk_available_mib = await asyncio.to_thread(doctor.disk_available_mib, host.settings)
        return status

    @answered
    async def GetPressure(self, request: pb.Empty, context: _Context) -> host_pb.HostPressure:
        pids = {live.id: live.process.pid for live in self._host.machines.values() if live.process is not None}
        now = await asyncio.to_thread(pressure.measure, self._host.memory_groups)
        used = await asyncio.to_thread(pressure.cpu_seconds, pids)
        return host_pb.HostPressure(
            memory_total_mib=now.total_mib,
            memory_available_mib=now.available_mib,
            some_percent=now.some_percent,
            full_percent=now.full_percent,
            machines=[host_pb.MachineActivity(machine=machine, cpu_s=cpu_s) for machine, cpu_s in used.items()],
        )

    def _ksm(self) -> pb.KsmStatus:
        pids = [live.process.pid for live in self._host.machines.values() if live.process is not None]
        saving = self._host.ksm.saving(pids)
        return pb.KsmStatus(
            running=saving.running,
            tenants=saving.tenants,
            merged_bytes=saving.merged_bytes,
            profit_bytes=saving.profit_bytes,
            full_scans=saving.full_scans,
        )

    @answered
    async def GetKsm(self, request: pb.Empty, context: _Context) -> pb.KsmStatus:
        return await asyncio.to_thread(self._ksm)

    @answered
    async def SetKsm(self, request: host_pb.HostSetKsmRequest, context: _Context) -> pb.KsmStatus:
        work = self._host.ksm.set(list(request.tenants), self._host.machines.values())
        await self._to_the_end("ksm", work)
        return await asyncio.to_thread(self._ksm)

    @answered
    async def Doctor(self, request: pb.Empty, context: _Context) -> host_pb.HostDoctorResponse:
        checks = await doctor.checks(self._host.settings, self._host.build_if_any, self._host.accelerator_if_any)
        return host_pb.HostDoctorResponse(
            checks=[
                pb.Check(
                    name=check.name,
                    verdict=pb.Check.Verdict.Value(f"VERDICT_{check.verdict.upper()}"),
                    detail=check.detail,
                    remedy=check.remedy,
                )
                for check in checks
            ]
        )

    # -- machines ------------------------------------------------------------------------------------------------

    @answered
    async def BootMachine(self, request: host_pb.BootMachineRequest, context: _Context) -> pb.Machine:
        host, machine = self._host, MachineId(check_id(request.machine))
        if machine in host.machines:
            return convert.machine_to_wire(host.machines[machine].view())
        work = boot.boot_machine(
            host,
            machine,
            check_name("machine", request.name),
            ImageId(check_id(request.image)),
            convert.shape_from_wire(request.shape),
            config_from_wire(request.config),
            request.tenant or DEFAULT_TENANT,
        )
        return convert.machine_to_wire(await self._to_the_end(f"boot-{machine}", work))

    @answered
    async def MakeTemplate(self, request: host_pb.MakeTemplateRequest, context: _Context) -> pb.Snapshot:
        snapshot = SnapshotId(check_id(request.snapshot))
        work = boot.make_template(
            self._host,
            snapshot,
            ImageId(check_id(request.image)),
            convert.shape_from_wire(request.shape),
            request.tenant or DEFAULT_TENANT,
        )
        return convert.snapshot_to_wire(await self._to_the_end(f"template-{snapshot}", work))

    @answered
    async def ForkMachine(self, request: host_pb.ForkMachineRequest, context: _Context) -> pb.ForkResult:
        host, snapshot = self._host, SnapshotId(check_id(request.snapshot))
        new_children = _children(request.children)
        if snapshot in host.snapshots:
            return convert.fork_result_to_wire(self._made_before(snapshot, new_children))
        live = host.machine(check_id(request.machine))
        new = NewSnapshot(snapshot, convert.kind_from_wire(request.kind), request.tag, request.message)
        work = fork.fork_machine(host, live, new, new_children, options_from_wire(request.options))
        return convert.fork_result_to_wire(await self._to_the_end(f"fork-{snapshot}", work))

    def _made_before(self, snapshot: SnapshotId, new_children: Iterable[NewChild]) -> ForkResult:
        """The answer to a fork that is asked for again."""
        record = self._host.snapshot(snapshot)
        made = tuple(
            Child(self._host.machines[child.id].view(), 0.0)
            for child in new_children
            if child.id in self._host.machines
        )
        parent, pause_ms = record.snapshot.machine, record.snapshot.pause_ms
        return ForkResult(snapshot=record.snapshot, parent=parent, pause_ms=pause_ms, children=made)

    @answered
    async def ForkSnapshot(self, request: host_pb.ForkSnapshotRequest, context: _Context) -> pb.ForkResult:
        host = self._host
        record = host.snapshot(check_id(request.snapshot))
        new_children = _children(request.children)
        if any(child.id in host.machines for child in new_children):
            raise AlreadyExists("machine", ", ".join(c.id for c in new_children if c.id in host.machines))
        work = children.fork_snapshot(host, record, new_children, options_from_wire(request.options))
        made = await self._to_the_end(f"fork-{record.snapshot.id}", work)
        host.refill_pool(record)
        return convert.fork_result_to_wire(
            ForkResult(snapshot=record.snapshot, parent=None, pause_ms=0.0, children=made)
        )

    @answered
    async def PauseMachine(self, request: host_pb.HostMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        return convert.machine_to_wire(await self._to_the_end("pause", lifecycle.pause_machine(live)))

    @answered
    async def ResumeMachine(self, request: host_pb.HostMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        return convert.machine_to_wire(await self._to_the_end("resume", lifecycle.resume_machine(live)))

    @answered
    async def AcquireMachine(self, request: host_pb.HostAcquireMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        name = check_name("machine", request.name or live.name)
        work = acquire.acquire_machine(self._host, live, name)
        return convert.machine_to_wire(await self._to_the_end("acquire", work))

    @answered
    async def StopMachine(self, request: host_pb.HostStopMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        work = lifecycle.stop_machine(self._host, live, force=request.force)
        return convert.machine_to_wire(await self._to_the_end("stop", work))

    @answered
    async def StartMachine(self, request: host_pb.HostMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        if live.state is MachineState.RUNNING:
            return convert.machine_to_wire(live.view())
        return convert.machine_to_wire(await self._to_the_end("start", boot.start_machine(self._host, live)))

    @answered
    async def RestoreMachine(self, request: host_pb.HostRestoreMachineRequest, context: _Context) -> pb.Machine:
        live, record = self._host.machine(request.machine), self._host.snapshot(check_id(request.snapshot))
        work = restore.restore_machine(self._host, live, record)
        return convert.machine_to_wire(await self._to_the_end("restore", work))

    @streamed
    async def HibernateMachine(
        self, request: host_pb.HostHibernateMachineRequest, context: _Context
    ) -> AsyncIterator[host_pb.HostMachineUpdate]:
        live, snapshot = self._host.machine(request.machine), SnapshotId(check_id(request.snapshot))
        steps: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(
            hibernation.hibernate_machine(self._host, live, snapshot, steps.put_nowait), name=f"hibernate-{live.id}"
        )
        task.add_done_callback(lambda _: steps.put_nowait(None))
        self._host.keep(task)  # it goes on to its end, though the caller may go away
        while (step := await steps.get()) is not None:
            yield host_pb.HostMachineUpdate(progress=convert.progress_to_wire(step))
        yield host_pb.HostMachineUpdate(machine=convert.machine_to_wire(await task))

    @answered
    async def WakeMachine(self, request: host_pb.HostMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        return convert.machine_to_wire(await self._to_the_end("wake", restore.wake_machine(self._host, live)))

    @answered
    async def ConfigureMachine(self, request: host_pb.ConfigureMachineRequest, context: _Context) -> pb.Machine:
        live = self._host.machine(request.machine)
        work = lifecycle.configure_machine(self._host, live, config_from_wire(request.config))
        return convert.machine_to_wire(await self._to_the_end("configure", work))

    @answered
    async def RemoveMachine(self, request: host_pb.HostMachineRequest, context: _Context) -> pb.Empty:
        live = self._host.machines.get(MachineId(request.machine))
        if live is not None:
            await self._to_the_end("remove", lifecycle.remove_machine(self._host, live))
        return pb.Empty()

    @answered
    async def ListMachines(self, request: pb.Empty, context: _Context) -> host_pb.HostListMachinesResponse:
        machines = [convert.machine_to_wire(live.view()) for live in self._host.machines.values()]
        return host_pb.HostListMachinesResponse(machines=machines)

    @streamed
    async def ReadConsole(
        self, request: host_pb.HostReadConsoleRequest, context: _Context
    ) -> AsyncIterator[host_pb.HostConsoleChunk]:
        live = self._host.machine(request.machine)
        async for data in read_console(live, follow=request.follow):
            yield host_pb.HostConsoleChunk(data=data)

    @streamed
    async def WatchMachines(self, request: pb.Empty, context: _Context) -> AsyncIterator[pb.Machine]:
        async for machine in self._host.watch_machines():
            yield convert.machine_to_wire(machine)

    # -- snapshots -----------------------------------------------------------------------------------------------

    @answered
    async def ListSnapshots(self, request: pb.Empty, context: _Context) -> host_pb.HostListSnapshotsResponse:
        # A lost one is none any more; hostd keeps its record while something stands on its disk.
        records = [record for record in self._host.snapshots.values() if record.phase is not SnapshotPhase.LOST]
        sizes = await asyncio.to_thread(lambda: [_own_disk_bytes(record) for record in records])
        snapshots = [
            convert.snapshot_to_wire(replace(record.snapshot, own_disk_bytes=size))
            for record, size in zip(records, sizes, strict=True)
        ]
        return host_pb.HostListSnapshotsResponse(snapshots=snapshots)

    @answered
    async def LabelSnapshot(self, request: host_pb.HostLabelSnapshotRequest, context: _Context) -> pb.Snapshot:
        record = self._host.snapshot(check_id(request.snapshot))
        kind = convert.kind_from_wire(request.kind)
        tenant = request.tenant or DEFAULT_TENANT
        labelled = replace(record.snapshot, kind=kind, tag=request.tag, message=request.message, tenant=tenant)
        self._host.save_snapshot(replace(record, snapshot=labelled))
        await asyncio.to_thread(self._host.snapshot_ledger.sync, labelled.id)
        return convert.snapshot_to_wire(labelled)

    @answered
    async def RemoveSnapshot(self, request: host_pb.HostSnapshotRequest, context: _Context) -> pb.Empty:
        record = self._host.snapshots.get(SnapshotId(request.snapshot))
        if record is not None:
            await self._to_the_end("remove-snapshot", packing.remove_snapshot(self._host, record))
        return pb.Empty()

    @streamed
    async def Shutdown(self, request: pb.Empty, context: _Context) -> AsyncIterator[pb.Progress]:
        async for progress in shutdown.shut_down(self._host):
            yield convert.progress_to_wire(progress)

    # -- images --------------------------------------------------------------------------------------------------

    @streamed
    async def PackSnapshot(self, request: host_pb.HostSnapshotRequest, context: _Context) -> AsyncIterator[pb.Progress]:
        snapshot = SnapshotId(check_id(request.snapshot))
        self._host.snapshot(snapshot)
        async for progress in packing.pack(self._host, snapshot):
            yield convert.progress_to_wire(progress)

    @streamed
    async def DiffMemory(
        self, request: pb.DiffMemoryRequest, context: _Context
    ) -> AsyncIterator[pb.DiffMemoryResponse]:
        before, after = (SnapshotId(check_id(each)) for each in (request.before, request.after))
        async for update in comparison.memory_diff(self._host, before, after):
            yield convert.memory_diff_to_wire(update)

    @streamed
    async def BuildImage(
        self, request: host_pb.HostBuildImageRequest, context: _Context
    ) -> AsyncIterator[host_pb.HostBuildImageResponse]:
        steps: asyncio.Queue[Progress | None] = asyncio.Queue()
        name = check_name("image", request.name or "debian-12")
        building = asyncio.create_task(
            debian.build_default(self._host.images, name, rebuild=request.rebuild, progress=steps.put_nowait)
        )
        building.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield host_pb.HostBuildImageResponse(progress=convert.progress_to_wire(step))
            yield host_pb.HostBuildImageResponse(image=convert.image_to_wire(await building))
        finally:
            building.cancel()  # a build that nobody waits for is not worth its CPU

    @answered
    async def ListImages(self, request: pb.Empty, context: _Context) -> host_pb.HostListImagesResponse:
        images = await asyncio.to_thread(self._host.images.list)
        return host_pb.HostListImagesResponse(images=[convert.image_to_wire(image) for image in images])

    @answered
    async def UpdateImage(self, request: host_pb.HostUpdateImageRequest, context: _Context) -> pb.Image:
        paths = tuple(request.forget_files)
        children.check_forgettable(files=paths)
        image = ImageId(check_id(request.image))
        return convert.image_to_wire(await asyncio.to_thread(self._host.images.set_forget_files, image, paths))

    @answered
    async def RemoveImage(self, request: host_pb.HostImageRequest, context: _Context) -> pb.Empty:
        image = ImageId(check_id(request.image))
        self._host.check_image_unused(image)
        await asyncio.to_thread(self._host.images.remove, image)
        return pb.Empty()


def _own_disk_bytes(record: SnapshotRecord) -> int:
    """What was written to the snapshot's disk, where that is a file of its own; else what packing has found."""
    try:
        return record.disk.stat().st_blocks * 512
    except OSError:
        return record.snapshot.own_disk_bytes


def _children(messages: Iterable[host_pb.NewChild]) -> list[NewChild]:
    found = [
        NewChild(
            MachineId(check_id(m.machine)),
            check_name("machine", m.name),
            config_from_wire(m.config),
            m.tenant or DEFAULT_TENANT,
        )
        for m in messages
    ]
    if len({child.id for child in found}) != len(found):
        raise InvalidRequest("two children of a fork have the same id")
    return found
