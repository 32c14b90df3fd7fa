"""Pools of warm machines, and the leases under which these and others are held. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from forkypig.model.access import DEFAULT_TENANT
from forkypig.model.config import MachineConfig
from forkypig.model.ids import ImageId, MachineId, PoolId, SnapshotId
from forkypig.model.records import Machine, Shape

DEFAULT_TTL_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A named set of machines that are ready to be acquired: each with an identity of its own, loaded and paused."""

    id: PoolId
    name: str
    tenant: str = DEFAULT_TENANT
    source: str  # what it was made from, as it was called then
    from_image: bool  # its machines begin as the template of `image`, which is made anew where it can't be loaded
    image: ImageId
    snapshot: SnapshotId | None  # its machines begin as this one; None: the template is still to be made
    shape: Shape
    config: MachineConfig = MachineConfig()
    target: int  # machines that stand ready when nobody asks for any
    max: int  # machines altogether: ready, on their way, and acquired
    created_us: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """For how long a machine stays that is not used."""

    machine: MachineId
    machine_name: str = ""
    pool: PoolId  # "": it was not acquired, but made with a lease
    pool_name: str
    tenant: str = DEFAULT_TENANT
    holder: str = ""  # who acquired or made it
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float = DEFAULT_TTL_S
    acquired_us: int = 0
    expires_us: int = 0  # moves when the machine is used


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """A pool and what is in it now."""

    pool: Pool
    ready: int = 0
    filling: int = 0
    acquired: int = 0
    waiting: int = 0  # callers that wait for a machine
    wanted: int = 0  # machines that are to stand ready, by the demand of late
    failure: str = ""  # why the last refill failed
    machines: tuple[Machine, ...] = ()  # those that wait in it
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class Acquired:
    """A machine of a pool that is somebody's now."""

    machine: Machine
    lease: Lease
    waited_ms: float  # in the queue
    arrived_us: int  # when it took its place there
