"""A snapshot that is about to be: what was asked for, and its first record."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forkypig.daemon.server import now_us
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.model import ImageId, MachineId, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.model.access import DEFAULT_TENANT
from forkypig.qemu import cpu
from forkypig.qemu.command import Hardware

if TYPE_CHECKING:
    from forkypig.hostd.host import Host


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """A snapshot that is asked for."""

    id: SnapshotId
    kind: SnapshotKind
    tag: str = ""
    message: str = ""


def first_record(
    host: "Host",
    new: NewSnapshot,
    hardware: Hardware,
    image: ImageId,
    shape: Shape,
    *,
    parent: SnapshotId | None = None,
    machine: MachineId | None = None,
    tenant: str = DEFAULT_TENANT,
    phase: SnapshotPhase,
    **where: Any,
) -> SnapshotRecord:
    """Of a machine with this hardware, made now, here. `where`: the fields of SnapshotRecord that say where its parts
    lie."""
    seen = cpu.seen_with(hardware.cpu_model)
    snapshot = Snapshot(
        id=new.id,
        kind=new.kind,
        tag=new.tag,
        message=new.message,
        parent=parent,
        machine=machine,
        image=image,
        shape=shape,
        machine_type=hardware.machine_type,
        qemu_build=host.qemu_build,
        accelerator=hardware.accelerator,
        cpu_model=hardware.cpu_model,
        created_us=now_us(),
        tenant=tenant,
    )
    devices = host.devices_path(new.id)
    return SnapshotRecord(
        snapshot=snapshot,
        phase=phase,
        hardware=hardware,
        devices=devices,
        cpu=seen.name,
        cpu_features=seen.features,
        **where,
    )
