"""The Controller service: protobuf in, protobuf out, errors as gRPC status. What is done is in the other modules."""

# gRPC names a servicer's methods as the .proto does.

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import grpc

from forkypig.controller.changes import Changes
from forkypig.controller.collector import Collector
from forkypig.controller.desk import Desk, as_seen, find_machine, find_own_snapshot, find_snapshot, find_source
from forkypig.controller.forks import ForkRequest, Forks
from forkypig.controller.health import Health
from forkypig.controller.host import followed
from forkypig.controller.images import Images
from forkypig.controller.journal import Caller
from forkypig.controller.pages import paged
from forkypig.controller.principal import principal, require_operator
from forkypig.controller.runs import RunRequest, Runs
from forkypig.controller.store import events, machines, snapshots
from forkypig.controller.streams import progressing
from forkypig.controller.tags import Tags
from forkypig.core.genealogy import history
from forkypig.errors import ForkyError
from forkypig.model import Image, Machine, MachineId, Progress, Snapshot, check_name
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.v1 import controller_pb2_grpc, host_pb2
from forkypig.wire import convert
from forkypig.wire.config import change_from_wire, options_from_wire
from forkypig.wire.edge import answered, streamed

P = ParamSpec("P")
R = TypeVar("R")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Operations:
    """What the service is made of."""

    runs: Runs
    forks: Forks
    changes: Changes
    collector: Collector
    tags: Tags
    images: Images
    health: Health


class ControllerServicer(controller_pb2_grpc.ControllerServicer):
    """forkypig.v1.Controller."""

    def __init__(self, desk: Desk, operations: Operations) -> None:
        self._desk, self._do = desk, operations

    def _machine(self, machine: Machine) -> common.Machine:
        return self._doing(machine, self._desk.journal.operation_on(machine))

    def _doing(self, machine: Machine, operation: str) -> common.Machine:
        """With what the records don't say."""
        expires_us = self._desk.leases.expires_us(machine.id)
        return convert.machine_to_wire(replace(machine, operation=operation, expires_us=expires_us))

    @answered
    async def GetStatus(self, request: common.Empty, context: Context) -> pb.GetStatusResponse:
        return await self._do.health.status()

    @answered
    async def Doctor(self, request: common.Empty, context: Context) -> pb.DoctorResponse:
        return await self._do.health.doctor()

    # -- making --------------------------------------------------------------------------------------------------------

    @streamed
    async def RunMachine(self, request: pb.RunMachineRequest, context: Context) -> AsyncIterator[pb.RunMachineResponse]:
        caller = Caller()
        change = change_from_wire(request.config)
        shape = convert.shape_from_wire(request.shape)
        asked = RunRequest(
            request.image, request.name, shape, request.cold_boot, change, request.snapshot, request.ttl_s
        )
        running = progressing(self._desk.journal, lambda show: self._do.runs.run(asked, show, caller), caller)
        async with aclosing(running):
            async for update in running:
                if isinstance(update, Progress):
                    yield pb.RunMachineResponse(progress=convert.progress_to_wire(update))
                else:
                    self._desk.host.measured.ran(update.ready_ms)
                    result = pb.RunResult(
                        machine=self._machine(update.machine), ready_ms=update.ready_ms, pool=update.pool
                    )
                    yield pb.RunMachineResponse(result=result)

    @answered
    async def Fork(self, request: pb.ForkRequest, context: Context) -> common.ForkResult:
        options, change = options_from_wire(request.options), change_from_wire(request.config)
        asked = ForkRequest(request.source, request.count, request.name_prefix, options, change, request.ttl_s)
        made = convert.fork_result_to_wire(await self._do.forks.fork(asked))
        for child in made.children:
            child.machine.expires_us = self._desk.leases.expires_us(MachineId(child.machine.id))
        return made

    @answered
    async def TakeSnapshot(self, request: pb.TakeSnapshotRequest, context: Context) -> common.Snapshot:
        made = await self._do.forks.take_snapshot(
            request.machine, request.tag, request.message, quiesce=request.quiesce
        )
        return convert.snapshot_to_wire(made)

    # -- machines ------------------------------------------------------------------------------------------------------

    @answered
    async def GetMachine(self, request: pb.MachineRequest, context: Context) -> common.Machine:
        async with self._desk.store.glance() as tx:
            machine = await find_machine(tx, request.machine)
            doing = await self._desk.operation_on(tx, machine)
        return self._doing(machine, doing)

    @answered
    async def ListMachines(self, request: pb.ListMachinesRequest, context: Context) -> pb.ListMachinesResponse:
        if request.name_prefix:
            check_name("machine", request.name_prefix.rstrip("-"))
        async with self._desk.store.read() as tx:
            tenant, prefix = principal().tenant, request.name_prefix
            found, token = await paged(
                lambda limit, after: machines.page(tx, tenant, limit=limit, after=after, name_prefix=prefix),
                request.page_size,
                request.page_token,
            )
            doing = await self._desk.operations(tx)
        return pb.ListMachinesResponse(
            machines=[self._doing(m, doing.get(m.id, "")) for m in found],
            next_page_token=token,
        )

    @answered
    async def PauseMachine(self, request: pb.MachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.pause(request.machine))

    @answered
    async def ResumeMachine(self, request: pb.MachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.resume(request.machine))

    @answered
    async def StopMachine(self, request: pb.StopMachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.stop(request.machine, force=request.force))

    @answered
    async def StartMachine(self, request: pb.MachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.start(request.machine))

    @answered
    async def RestoreMachine(self, request: pb.RestoreMachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.restore(request.machine, request.snapshot, request.keep_tag))

    @streamed
    async def HibernateMachine(self, request: pb.MachineRequest, context: Context) -> AsyncIterator[pb.MachineUpdate]:
        changes, journal = self._do.changes, self._desk.journal
        hibernating = progressing(journal, lambda show: changes.hibernate(request.machine, show), Caller())
        async with aclosing(hibernating):
            async for update in hibernating:
                if isinstance(update, Machine):
                    yield pb.MachineUpdate(machine=self._machine(update))
                else:
                    yield pb.MachineUpdate(progress=convert.progress_to_wire(update))

    @answered
    async def WakeMachine(self, request: pb.MachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.wake(request.machine))

    @answered
    async def UpdateMachine(self, request: pb.UpdateMachineRequest, context: Context) -> common.Machine:
        return self._machine(await self._do.changes.update(request.machine, change_from_wire(request.change)))

    @answered
    async def RemoveMachine(self, request: pb.MachineRequest, context: Context) -> common.Empty:
        await self._do.changes.remove(request.machine)
        return common.Empty()

    @streamed
    async def ReadConsole(self, request: pb.ReadConsoleRequest, context: Context) -> AsyncIterator[pb.ConsoleChunk]:
        async with self._desk.store.glance() as tx:
            machine = await find_machine(tx, request.machine)
        asked = host_pb2.HostReadConsoleRequest(machine=machine.id, follow=request.follow)
        async with aclosing(followed(self._desk.host.stub.ReadConsole(asked))) as chunks:
            async for chunk in chunks:
                yield pb.ConsoleChunk(data=chunk.data)

    # -- snapshots and events ------------------------------------------------------------------------------------------

    @answered
    async def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: Context) -> pb.ListSnapshotsResponse:
        async with self._desk.store.read() as tx:
            tenant = principal().tenant
            found, token = await paged(
                lambda limit, after: snapshots.page(tx, tenant, limit=limit, after=after),
                request.page_size,
                request.page_token,
            )
            found = await as_seen(tx, found)
        lying = [convert.snapshot_to_wire(s) for s in await self._as_they_lie(found)]
        return pb.ListSnapshotsResponse(snapshots=lying, next_page_token=token)

    @answered
    async def GetSnapshot(self, request: pb.SnapshotRequest, context: Context) -> common.Snapshot:
        async with self._desk.store.read() as tx:
            found = await as_seen(tx, [await find_snapshot(tx, request.snapshot)])
        return convert.snapshot_to_wire((await self._as_they_lie(found))[0])

    @answered
    async def GetHistory(self, request: pb.HistoryRequest, context: Context) -> pb.ListSnapshotsResponse:
        async with self._desk.store.read() as tx:
            source = await find_source(tx, request.source)
            start = source.snapshot if isinstance(source, Machine) else source.id
            chain = await as_seen(tx, history(start, await snapshots.seen_by(tx, principal().tenant)))
        return pb.ListSnapshotsResponse(snapshots=[convert.snapshot_to_wire(s) for s in await self._as_they_lie(chain)])

    @answered
    async def TagSnapshot(self, request: pb.TagSnapshotRequest, context: Context) -> common.Snapshot:
        tagged = await self._do.tags.add(request.snapshot, request.tag, force=request.force)
        return convert.snapshot_to_wire((await self._as_they_lie([tagged]))[0])

    @answered
    async def UntagSnapshot(self, request: pb.UntagSnapshotRequest, context: Context) -> common.Snapshot:
        untagged = await self._do.tags.remove(request.tag)
        return convert.snapshot_to_wire((await self._as_they_lie([untagged]))[0])

    async def _as_they_lie(self, rows: Sequence[Snapshot]) -> Sequence[Snapshot]:
        """The snapshots with where their memory is now, which the host changes by itself; as they were when it can't
        be asked."""
        try:
            seen = await self._desk.host.snapshots()
        except ForkyError:
            return rows
        return [
            replace(
                row,
                packed=now.packed,
                own_memory_bytes=now.own_memory_bytes,
                own_disk_bytes=now.own_disk_bytes,
            )
            if (now := seen.get(row.id)) is not None
            else row
            for row in rows
        ]

    @answered
    async def RemoveSnapshot(self, request: pb.SnapshotRequest, context: Context) -> common.Empty:
        async with self._desk.store.read() as tx:
            snapshot = await find_own_snapshot(tx, request.snapshot)
        await self._desk.reconciler.ensure_reachable()
        await self._desk.journal.carry(self._do.collector.remove(snapshot.id))
        return common.Empty()

    @streamed
    async def PackSnapshot(self, request: pb.SnapshotRequest, context: Context) -> AsyncIterator[common.Progress]:
        async with self._desk.store.read() as tx:
            snapshot = await find_snapshot(tx, request.snapshot)
        await self._desk.reconciler.ensure_reachable()
        async with aclosing(self._desk.host.pack_snapshot(snapshot.id)) as packing:
            async for progress in packing:
                yield convert.progress_to_wire(progress)

    @streamed
    async def DiffMemory(
        self, request: common.DiffMemoryRequest, context: Context
    ) -> AsyncIterator[common.DiffMemoryResponse]:
        async with self._desk.store.read() as tx:
            before, after = [await find_snapshot(tx, each) for each in (request.before, request.after)]
        await self._desk.reconciler.ensure_reachable()
        async with aclosing(self._desk.host.diff_memory(before.id, after.id)) as comparing:
            async for update in comparing:
                yield convert.memory_diff_to_wire(update)

    @answered
    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        async with self._desk.store.read() as tx:
            found = await events.after(tx, principal().tenant, request.after_sequence, request.limit)
        return pb.ListEventsResponse(events=[convert.event_to_wire(event) for event in found])

    # -- images --------------------------------------------------------------------------------------------------------

    @streamed
    async def BuildImage(self, request: pb.BuildImageRequest, context: Context) -> AsyncIterator[pb.BuildImageResponse]:
        require_operator("build images")
        async with aclosing(self._do.images.build(request.name, rebuild=request.rebuild)) as building:
            async for update in building:
                if isinstance(update, Image):
                    yield pb.BuildImageResponse(image=convert.image_to_wire(update))
                else:
                    yield pb.BuildImageResponse(progress=convert.progress_to_wire(update))

    @answered
    async def ListImages(self, request: common.Empty, context: Context) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=[convert.image_to_wire(i) for i in await self._do.images.every()])

    @answered
    async def GetImage(self, request: pb.ImageRequest, context: Context) -> common.Image:
        return convert.image_to_wire(await self._do.images.get(request.image))

    @answered
    async def UpdateImage(self, request: pb.UpdateImageRequest, context: Context) -> common.Image:
        return convert.image_to_wire(await self._do.images.update(request.image, request.forget_files))

    @answered
    async def RemoveImage(self, request: pb.ImageRequest, context: Context) -> common.Empty:
        await self._do.images.remove(request.image)
        return common.Empty()
