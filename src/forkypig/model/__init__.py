"""The words of Forky Pig as frozen dataclasses: machines, shapes, snapshots, images. Standard library only."""

from forkypig.model.config import ConfigChange, ForkOptions, MachineConfig, Restart
from forkypig.model.ids import (
    ImageId,
    MachineId,
    PoolId,
    SnapshotId,
    check_message,
    check_name,
    new_machine_id,
    new_pool_id,
    new_snapshot_id,
)
from forkypig.model.limits import Limits
from forkypig.model.network import Egress, NetworkMode, NetworkPolicy, PortForward, TcpMode
from forkypig.model.pools import Acquired, Lease, Pool, PoolStatus
from forkypig.model.records import (
    Child,
    Event,
    ForkResult,
    Image,
    Machine,
    MachineState,
    MemoryDiff,
    Progress,
    Shape,
    Snapshot,
    SnapshotKind,
)

__all__ = [
    "Acquired",
    "Child",
    "ConfigChange",
    "Egress",
    "Event",
    "ForkOptions",
    "ForkResult",
    "Image",
    "ImageId",
    "Lease",
    "Limits",
    "Machine",
    "MachineConfig",
    "MachineId",
    "MachineState",
    "MemoryDiff",
    "NetworkMode",
    "NetworkPolicy",
    "Pool",
    "PoolId",
    "PoolStatus",
    "PortForward",
    "Progress",
    "Restart",
    "Shape",
    "Snapshot",
    "SnapshotId",
    "SnapshotKind",
    "TcpMode",
    "check_message",
    "check_name",
    "new_machine_id",
    "new_pool_id",
    "new_snapshot_id",
]
