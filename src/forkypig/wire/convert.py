"""Model <-> protobuf, one pair of functions a type. Empty strings stand for None on the wire."""

from forkypig import model
from forkypig.errors import InvalidRequest
from forkypig.model.access import DEFAULT_TENANT
from forkypig.model.ids import ImageId, MachineId, PoolId, SnapshotId
from forkypig.v1 import common_pb2 as pb
from forkypig.wire.config import config_from_wire, config_to_wire

_STATES = {state: pb.MachineState.Value(f"MACHINE_STATE_{state.name}") for state in model.MachineState}
_STATES_BACK = {number: state for state, number in _STATES.items()}
_KINDS = {kind: pb.SnapshotKind.Value(f"SNAPSHOT_KIND_{kind.name}") for kind in model.SnapshotKind}
_KINDS_BACK = {number: kind for kind, number in _KINDS.items()}


def shape_to_wire(shape: model.Shape) -> pb.Shape:
    return pb.Shape(cpus=shape.cpus, memory_mib=shape.memory_mib, disk_mib=shape.disk_mib)


def shape_from_wire(message: pb.Shape) -> model.Shape:
    return model.Shape(cpus=message.cpus, memory_mib=message.memory_mib, disk_mib=message.disk_mib)


def kind_to_wire(kind: model.SnapshotKind) -> pb.SnapshotKind.ValueType:
    return _KINDS[kind]


def kind_from_wire(number: int) -> model.SnapshotKind:
    """Raises InvalidRequest."""
    if (kind := _KINDS_BACK.get(pb.SnapshotKind.ValueType(number))) is None:
        raise InvalidRequest(f"there is no kind {number} of snapshots")
    return kind


def machine_to_wire(machine: model.Machine) -> pb.Machine:
    return pb.Machine(
        id=machine.id,
        name=machine.name,
        state=_STATES[machine.state],
        image=machine.image,
        image_name=machine.image_name,
        shape=shape_to_wire(machine.shape),
        snapshot=machine.snapshot or "",
        parent=machine.parent or "",
        qemu_pid=machine.qemu_pid or 0,
        address=machine.address or "",
        failure=machine.failure,
        accelerator=machine.accelerator,
        accelerator_reason=machine.accelerator_reason,
        created_us=machine.created_us,
        operation=machine.operation,
        expires_us=machine.expires_us,
        config=config_to_wire(machine.config),
        tenant=machine.tenant,
        pool=machine.pool or "",
    )


def machine_from_wire(message: pb.Machine) -> model.Machine:
    return model.Machine(
        id=MachineId(message.id),
        name=message.name,
        state=_STATES_BACK[message.state],
        image=ImageId(message.image),
        image_name=message.image_name,
        shape=shape_from_wire(message.shape),
        snapshot=SnapshotId(message.snapshot) if message.snapshot else None,
        parent=MachineId(message.parent) if message.parent else None,
        qemu_pid=message.qemu_pid or None,
        address=message.address or None,
        failure=message.failure,
        accelerator=message.accelerator,
        accelerator_reason=message.accelerator_reason,
        created_us=message.created_us,
        operation=message.operation,
        expires_us=message.expires_us,
        config=config_from_wire(message.config),
        tenant=message.tenant or DEFAULT_TENANT,
        pool=PoolId(message.pool) if message.pool else None,
    )


def snapshot_to_wire(snapshot: model.Snapshot) -> pb.Snapshot:
    return pb.Snapshot(
        id=snapshot.id,
        tag=snapshot.tag,
        message=snapshot.message,
        kind=_KINDS[snapshot.kind],
        parent=snapshot.parent or "",
        machine=snapshot.machine or "",
        image=snapshot.image,
        shape=shape_to_wire(snapshot.shape),
        machine_type=snapshot.machine_type,
        qemu_build=snapshot.qemu_build,
        accelerator=snapshot.accelerator,
        cpu_model=snapshot.cpu_model,
        pause_ms=snapshot.pause_ms,
        own_memory_bytes=snapshot.own_memory_bytes,
        own_disk_bytes=snapshot.own_disk_bytes,
        packed=snapshot.packed,
        created_us=snapshot.created_us,
        tenant=snapshot.tenant,
        shared_with=snapshot.shared_with,
    )


def snapshot_from_wire(message: pb.Snapshot) -> model.Snapshot:
    return model.Snapshot(
        id=SnapshotId(message.id),
        tag=message.tag,
        message=message.message,
        kind=_KINDS_BACK[message.kind],
        parent=SnapshotId(message.parent) if message.parent else None,
        machine=MachineId(message.machine) if message.machine else None,
        image=ImageId(message.image),
        shape=shape_from_wire(message.shape),
        machine_type=message.machine_type,
        qemu_build=message.qemu_build,
        accelerator=message.accelerator,
        cpu_model=message.cpu_model,
        pause_ms=message.pause_ms,
        own_memory_bytes=message.own_memory_bytes,
        own_disk_bytes=message.own_disk_bytes,
        packed=message.packed,
        created_us=message.created_us,
        tenant=message.tenant or DEFAULT_TENANT,
        shared_with=tuple(message.shared_with),
    )


def image_to_wire(image: model.Image) -> pb.Image:
    return pb.Image(
        id=image.id,
        name=image.name,
        size_bytes=image.size_bytes,
        kernel=image.kernel,
        sha256=image.sha256,
        created_us=image.created_us,
        description=image.description,
        forget_files=image.forget_files,
    )


def image_from_wire(message: pb.Image) -> model.Image:
    return model.Image(
        id=ImageId(message.id),
        name=message.name,
        size_bytes=message.size_bytes,
        kernel=message.kernel,
        sha256=message.sha256,
        created_us=message.created_us,
        description=message.description,
        forget_files=tuple(message.forget_files),
    )


def event_to_wire(event: model.Event) -> pb.Event:
    return pb.Event(
        sequence=event.sequence, time_us=event.time_us, kind=event.kind, subject=event.subject, detail=event.detail
    )


def event_from_wire(message: pb.Event) -> model.Event:
    return model.Event(
        sequence=message.sequence,
        time_us=message.time_us,
        kind=message.kind,
        subject=message.subject,
        detail=message.detail,
    )


def progress_to_wire(progress: model.Progress) -> pb.Progress:
    return pb.Progress(step=progress.step, done=progress.done, total=progress.total)


def progress_from_wire(message: pb.Progress) -> model.Progress:
    return model.Progress(message.step, message.done, message.total)


def memory_diff_to_wire(update: model.Progress | model.MemoryDiff) -> pb.DiffMemoryResponse:
    """What a comparison tells."""
    if isinstance(update, model.Progress):
        return pb.DiffMemoryResponse(progress=progress_to_wire(update))
    ranges = [pb.AddressRange(address=address, length=length) for address, length in update.ranges]
    return pb.DiffMemoryResponse(
        result=pb.MemoryDiff(pages=update.pages, total_pages=update.total_pages, ranges=ranges)
    )


def memory_diff_from_wire(message: pb.DiffMemoryResponse) -> model.Progress | model.MemoryDiff:
    if message.WhichOneof("update") == "progress":
        return progress_from_wire(message.progress)
    found = message.result
    return model.MemoryDiff(found.pages, found.total_pages, tuple((e.address, e.length) for e in found.ranges))


def fork_result_to_wire(result: model.ForkResult) -> pb.ForkResult:
    return pb.ForkResult(
        snapshot=snapshot_to_wire(result.snapshot),
        parent=result.parent or "",
        pause_ms=result.pause_ms,
        children=[pb.Child(machine=machine_to_wire(c.machine), ready_ms=c.ready_ms) for c in result.children],
    )


def fork_result_from_wire(message: pb.ForkResult) -> model.ForkResult:
    return model.ForkResult(
        snapshot=snapshot_from_wire(message.snapshot),
        parent=MachineId(message.parent) if message.parent else None,
        pause_ms=message.pause_ms,
        children=tuple(model.Child(machine_from_wire(c.machine), c.ready_ms) for c in message.children),
    )
