"""The controller's view of a host: hostd's services, with models in and out, deadlines, and errors in words."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from forkypig import tracing
from forkypig.controller.measurements import Measurements
from forkypig.controller.stamps import Stamp, StampedChannel
from forkypig.core.reconcile import Seen
from forkypig.errors import ForkyError, HostUnreachable
from forkypig.model import (
    ForkOptions,
    ForkResult,
    Image,
    ImageId,
    Machine,
    MachineConfig,
    MachineId,
    MemoryDiff,
    Progress,
    Shape,
    Snapshot,
    SnapshotId,
    SnapshotKind,
)
from forkypig.v1 import agent_pb2_grpc, host_pb2_grpc, observe_pb2, observe_pb2_grpc, store_pb2_grpc
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import host_pb2 as pb
from forkypig.wire import convert
from forkypig.wire.config import config_to_wire, options_to_wire
from forkypig.wire.ending import Ending
from forkypig.wire.status import from_rpc_error

# Questions that hostd answers from memory; the margin is for a host whose cores are all taken.
QUICK_S = 20.0
# A guest boots in 4 s on an idle core under TCG, and in minutes when dozens boot side by side.
BOOT_S = 420.0
# A thousand children on two cores at 30 to 60 ms each, several times over.
FORK_S = 900.0
CHANGE_S = 120.0
# hostd lets an operation that is under way on the machine end first.
REMOVE_S = 240.0
# All of a machine's memory to a disk that is shared with others.
PACK_S = 1800.0
# Packages come over the network.
BUILD_S = 3600.0
DOCTOR_S = 120.0

# A socket that comes back is noticed at once: gRPC's own back-off grows to two minutes.
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 100_000),
)
_GONE = "hostd, the daemon that runs machines, can't be reached: run `forky up` (its log is in FORKY_HOME/logs)"
_WITHOUT_CLASS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def in_words(error: grpc.aio.AioRpcError) -> ForkyError:
    """What hostd raised; or, where it is gRPC that failed, that hostd can't be reached."""
    ours = from_rpc_error(error)
    told_by_hostd = any(key == "forky-error" for key, _ in error.trailing_metadata() or ())
    if not told_by_hostd and error.code() in _WITHOUT_CLASS:
        return HostUnreachable(_GONE)
    return ours


@contextmanager
def host_errors() -> Iterator[None]:
    """Turns the gRPC errors of the block into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise in_words(error) from error


async def followed(call: Any) -> AsyncGenerator[Any, None]:
    """A stream of the host's, ended when nobody listens any more."""
    ending = Ending(call)
    try:
        with host_errors(), ending:
            async for message in call:
                yield message
    finally:
        call.cancel()


@dataclass(frozen=True, slots=True)
class Labels:
    """What is said of a snapshot."""

    kind: SnapshotKind
    tag: str = ""
    message: str = ""


class Host:
    """One host. Every method raises ForkyError: what hostd raised, HostUnreachable, or DeadlineExceeded."""

    def __init__(self, socket: Path) -> None:
        self.stamp: Stamp = ()  # who calls, where several controllers do
        self.measured = Measurements()
        self._channel = grpc.aio.insecure_channel(
            f"unix:{socket}", options=_OPTIONS, interceptors=tracing.interceptors()
        )
        stamped: Any = StampedChannel(self._channel, lambda: self.stamp)
        self.stub: host_pb2_grpc.HostAsyncStub = host_pb2_grpc.HostStub(stamped)
        self.agent: agent_pb2_grpc.AgentAsyncStub = agent_pb2_grpc.AgentStub(stamped)
        self.store: store_pb2_grpc.HostStoreAsyncStub = store_pb2_grpc.HostStoreStub(stamped)

        self.observation: observe_pb2_grpc.HostObservationAsyncStub = observe_pb2_grpc.HostObservationStub(
            self._channel
        )

    async def close(self) -> None:
        await self._channel.close()

    async def fence(self, controller: str, number: int) -> None:
        """From here on the host refuses calls of this controller with lower fencing numbers."""
        with host_errors():
            await self.stub.Fence(pb.FenceRequest(controller=controller, number=number), timeout=QUICK_S)

    async def status(self, timeout_s: float = QUICK_S) -> pb.HostStatus:
        with host_errors():
            return await self.stub.GetHostStatus(common.Empty(), timeout=timeout_s)

    async def usage(self, timeout_s: float = QUICK_S) -> observe_pb2.HostUsage:
        with host_errors():
            return await self.observation.GetUsage(common.Empty(), timeout=timeout_s)

    async def pressure(self, timeout_s: float) -> pb.HostPressure:
        """How little memory there is, and how much machines do."""
        with host_errors():
            return await self.stub.GetPressure(common.Empty(), timeout=timeout_s)

    async def ksm(self) -> common.KsmStatus:
        with host_errors():
            return await self.stub.GetKsm(common.Empty(), timeout=QUICK_S)

    async def set_ksm(self, tenants: Sequence[str]) -> common.KsmStatus:
        """KSM is for these tenants' machines, and no others."""
        with host_errors():
            return await self.stub.SetKsm(pb.HostSetKsmRequest(tenants=tenants), timeout=CHANGE_S)

    async def doctor(self) -> Sequence[common.Check]:
        with host_errors():
            return list((await self.stub.Doctor(common.Empty(), timeout=DOCTOR_S)).checks)

    async def seen(self) -> Seen:
        """Everything that is there. Snapshots are asked for last: a machine's snapshot is in the answer then."""
        with host_errors():
            machines = await self.stub.ListMachines(common.Empty(), timeout=QUICK_S)
        return Seen({MachineId(m.id): convert.machine_from_wire(m) for m in machines.machines}, await self.snapshots())

    async def snapshots(self) -> dict[SnapshotId, Snapshot]:
        """The snapshots that are there."""
        with host_errors():
            answer = await self.stub.ListSnapshots(common.Empty(), timeout=QUICK_S)
        return {SnapshotId(s.id): convert.snapshot_from_wire(s) for s in answer.snapshots}

    async def watch(self) -> AsyncGenerator[Machine, None]:
        """All machines, then each as it changes; ends only by an error. The one call without a deadline."""
        with host_errors():
            async for message in self.stub.WatchMachines(common.Empty()):
                yield convert.machine_from_wire(message)

    # -- making --------------------------------------------------------------------------------------------------------

    async def boot(self, machine: Machine) -> Machine:
        request = pb.BootMachineRequest(
            machine=machine.id,
            name=machine.name,
            image=machine.image,
            shape=convert.shape_to_wire(machine.shape),
            config=config_to_wire(machine.config),
            tenant=machine.tenant,
        )
        with host_errors():
            return convert.machine_from_wire(await self.stub.BootMachine(request, timeout=BOOT_S))

    async def make_template(self, snapshot: SnapshotId, image: ImageId, shape: Shape, tenant: str) -> Snapshot:
        request = pb.MakeTemplateRequest(
            snapshot=snapshot, image=image, shape=convert.shape_to_wire(shape), tenant=tenant
        )
        with host_errors():
            return convert.snapshot_from_wire(await self.stub.MakeTemplate(request, timeout=BOOT_S))

    async def fork_machine(
        self,
        machine: MachineId,
        snapshot: SnapshotId,
        labels: "Labels",
        children: Sequence[Machine],
        options: ForkOptions,
    ) -> ForkResult:
        request = pb.ForkMachineRequest(
            machine=machine,
            snapshot=snapshot,
            kind=convert.kind_to_wire(labels.kind),
            tag=labels.tag,
            message=labels.message,
            children=_new_children(children),
            options=options_to_wire(options),
        )
        with host_errors():
            result = convert.fork_result_from_wire(await self.stub.ForkMachine(request, timeout=FORK_S))
        self.measured.forked(result)
        return result

    async def fork_snapshot(
        self, snapshot: SnapshotId, children: Sequence[Machine], options: ForkOptions
    ) -> ForkResult:
        request = pb.ForkSnapshotRequest(
            snapshot=snapshot, children=_new_children(children), options=options_to_wire(options)
        )
        with host_errors():
            return convert.fork_result_from_wire(await self.stub.ForkSnapshot(request, timeout=FORK_S))

    # -- changing and removing -----------------------------------------------------------------------------------------

    async def pause(self, machine: MachineId) -> Machine:
        with host_errors():
            answer = await self.stub.PauseMachine(pb.HostMachineRequest(machine=machine), timeout=CHANGE_S)
        return convert.machine_from_wire(answer)

    async def resume(self, machine: MachineId) -> Machine:
        with host_errors():
            answer = await self.stub.ResumeMachine(pb.HostMachineRequest(machine=machine), timeout=CHANGE_S)
        return convert.machine_from_wire(answer)

    async def acquire(self, machine: MachineId, name: str = "") -> Machine:
        """Lets a machine that waited in a pool run, called `name`; "": as it was."""
        request = pb.HostAcquireMachineRequest(machine=machine, name=name)
        with host_errors():
            return convert.machine_from_wire(await self.stub.AcquireMachine(request, timeout=CHANGE_S))

    async def stop(self, machine: MachineId, *, force: bool) -> Machine:
        with host_errors():
            request = pb.HostStopMachineRequest(machine=machine, force=force)
            return convert.machine_from_wire(await self.stub.StopMachine(request, timeout=CHANGE_S))

    async def start(self, machine: MachineId) -> Machine:
        with host_errors():
            answer = await self.stub.StartMachine(pb.HostMachineRequest(machine=machine), timeout=BOOT_S)
        return convert.machine_from_wire(answer)

    async def configure(self, machine: MachineId, config: MachineConfig) -> Machine:
        request = pb.ConfigureMachineRequest(machine=machine, config=config_to_wire(config))
        with host_errors():
            return convert.machine_from_wire(await self.stub.ConfigureMachine(request, timeout=CHANGE_S))

    async def restore(self, machine: MachineId, snapshot: SnapshotId) -> Machine:
        request = pb.HostRestoreMachineRequest(machine=machine, snapshot=snapshot)
        with host_errors():
            return convert.machine_from_wire(await self.stub.RestoreMachine(request, timeout=BOOT_S))

    async def hibernate(self, machine: MachineId, snapshot: SnapshotId) -> AsyncGenerator[Progress | Machine, None]:
        """Progress, and the machine at last."""
        request = pb.HostHibernateMachineRequest(machine=machine, snapshot=snapshot)
        with host_errors():
            async for answer in self.stub.HibernateMachine(request, timeout=PACK_S):
                if answer.HasField("machine"):
                    yield convert.machine_from_wire(answer.machine)
                else:
                    yield convert.progress_from_wire(answer.progress)

    async def wake(self, machine: MachineId) -> Machine:
        with host_errors():
            answer = await self.stub.WakeMachine(pb.HostMachineRequest(machine=machine), timeout=BOOT_S)
        return convert.machine_from_wire(answer)

    async def label(self, snapshot: Snapshot) -> None:
        """Tells the host a snapshot's kind, tag, message and tenant."""
        request = pb.HostLabelSnapshotRequest(
            snapshot=snapshot.id,
            kind=convert.kind_to_wire(snapshot.kind),
            tag=snapshot.tag,
            message=snapshot.message,
            tenant=snapshot.tenant,
        )
        with host_errors():
            await self.stub.LabelSnapshot(request, timeout=QUICK_S)

    async def remove_machine(self, machine: MachineId) -> None:
        with host_errors():
            await self.stub.RemoveMachine(pb.HostMachineRequest(machine=machine), timeout=REMOVE_S)

    async def remove_snapshot(self, snapshot: SnapshotId) -> None:
        with host_errors():
            await self.stub.RemoveSnapshot(pb.HostSnapshotRequest(snapshot=snapshot), timeout=REMOVE_S)

    async def pack_snapshot(self, snapshot: SnapshotId) -> AsyncGenerator[Progress, None]:
        with host_errors():
            async for message in self.stub.PackSnapshot(pb.HostSnapshotRequest(snapshot=snapshot), timeout=BUILD_S):
                yield convert.progress_from_wire(message)

    async def diff_memory(self, before: SnapshotId, after: SnapshotId) -> AsyncGenerator[Progress | MemoryDiff, None]:
        """Progress, and the result at last."""
        with host_errors():
            request = common.DiffMemoryRequest(before=before, after=after)
            async for answer in self.stub.DiffMemory(request, timeout=BUILD_S):
                yield convert.memory_diff_from_wire(answer)

    # -- images --------------------------------------------------------------------------------------------------------

    async def build_image(self, name: str, *, rebuild: bool) -> AsyncGenerator[Progress | Image, None]:
        """Progress, and the image at last."""
        request = pb.HostBuildImageRequest(name=name, rebuild=rebuild)
        with host_errors():
            async for answer in self.stub.BuildImage(request, timeout=BUILD_S):
                if answer.HasField("image"):
                    yield convert.image_from_wire(answer.image)
                else:
                    yield convert.progress_from_wire(answer.progress)

    async def images(self) -> list[Image]:
        with host_errors():
            answer = await self.stub.ListImages(common.Empty(), timeout=QUICK_S)
        return [convert.image_from_wire(image) for image in answer.images]

    async def update_image(self, image: ImageId, forget_files: Sequence[str]) -> Image:
        request = pb.HostUpdateImageRequest(image=image, forget_files=forget_files)
        with host_errors():
            return convert.image_from_wire(await self.stub.UpdateImage(request, timeout=QUICK_S))

    async def remove_image(self, image: ImageId) -> None:
        with host_errors():
            await self.stub.RemoveImage(pb.HostImageRequest(image=image), timeout=REMOVE_S)


def _new_children(children: Sequence[Machine]) -> list[pb.NewChild]:
    return [
        pb.NewChild(machine=child.id, name=child.name, config=config_to_wire(child.config), tenant=child.tenant)
        for child in children
    ]
