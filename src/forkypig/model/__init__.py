"""The words of Forky Pig as frozen dataclasses: machines, shapes, snapshots, images. Standard library only."""

from forkypig.model.ids import (
    ImageId,
    MachineId,
    SnapshotId,
    check_name,
    new_machine_id,
    new_snapshot_id,
)
from forkypig.model.records import (
    Child,
    Event,
    ForkResult,
    Image,
    Machine,
    MachineState,
    Progress,
    Shape,
    Snapshot,
    SnapshotKind,
)

__all__ = [
    "Child",
    "Event",
    "ForkResult",
    "Image",
    "ImageId",
    "Machine",
    "MachineId",
    "MachineState",
    "Progress",
    "Shape",
    "Snapshot",
    "SnapshotId",
    "SnapshotKind",
    "check_name",
    "new_machine_id",
    "new_snapshot_id",
]
