"""What a machine, a snapshot, an image and the other things are. Units stand in the names; times are microseconds
since the Unix epoch."""

from dataclasses import dataclass, field
from enum import Enum

from forkypig.model.access import DEFAULT_TENANT
from forkypig.model.config import MachineConfig
from forkypig.model.ids import ImageId, MachineId, PoolId, SnapshotId


class MachineState(Enum):
    """Where a machine is in its life."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    HIBERNATED = "hibernated"  # no QEMU; its memory is in the snapshot that it stands on
    FAILED = "failed"
    REMOVING = "removing"


class SnapshotKind(Enum):
    """Why a snapshot is there, and so how long it stays."""

    FORK = "fork"  # came with a fork; goes when nothing stands on it
    KEPT = "kept"  # somebody asked for it; stays until it is removed
    HIBERNATION = "hibernation"  # came with a hibernation; goes when nothing stands on it
    TEMPLATE = "template"  # an image's first ready moment; later runs start from it


@dataclass(frozen=True, slots=True)
class Shape:
    """What a machine is made of; all positive."""

    cpus: int = 1
    memory_mib: int = 512
    disk_mib: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A guest: one QEMU process, one writable disk overlay, one identity."""

    id: MachineId
    name: str
    state: MachineState
    image: ImageId
    image_name: str = ""
    shape: Shape
    snapshot: SnapshotId | None = None  # it stands on this one; None: it booted cold
    parent: MachineId | None = None  # it was forked from this one
    qemu_pid: int | None = None
    address: str | None = None  # where the host reaches it
    failure: str = ""  # one sentence, when FAILED
    accelerator: str = ""  # "tcg" or "kvm"
    accelerator_reason: str = ""
    created_us: int = 0
    operation: str = ""  # what is being done to it now
    expires_us: int = 0  # by its lease, when it is removed unless it is used; 0: never
    config: MachineConfig = MachineConfig()
    pool: PoolId | None = None  # it waits there to be acquired, and is nobody's until then
    tenant: str = DEFAULT_TENANT  # whose it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The immutable state of a machine at one instant: memory, device state, disk."""

    id: SnapshotId
    kind: SnapshotKind
    tag: str = ""
    message: str = ""  # what whoever took it said about it
    parent: SnapshotId | None = None
    machine: MachineId | None = None  # it was taken from this one
    image: ImageId
    shape: Shape
    machine_type: str  # versioned: "pc-q35-7.2"
    qemu_build: str  # must be the same when it is loaded
    accelerator: str
    cpu_model: str
    pause_ms: float = 0.0
    own_memory_bytes: int = 0
    own_disk_bytes: int = 0  # what its machine wrote since the parent snapshot
    packed: bool = False  # True: memory in a file, False: in a frozen process
    created_us: int = 0
    tenant: str = DEFAULT_TENANT  # whose it is
    shared_with: tuple[str, ...] = ()  # tenants that may start machines from it; EVERY_TENANT: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A bootable base: a disk, a kernel and an initramfs; no memory."""

    id: ImageId
    name: str
    size_bytes: int
    kernel: str
    sha256: str
    created_us: int = 0
    description: str = ""
    forget_files: tuple[str, ...] = ()  # absolute paths that forks of its machines don't have


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened."""

    sequence: int
    time_us: int
    kind: str
    subject: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MemoryDiff:
    """Pages of 4 KiB of guest-physical memory whose content differs."""

    pages: int
    total_pages: int
    ranges: tuple[tuple[int, int], ...]  # address and length in bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation has come; `total` 0 means not known."""

    step: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Child:
    """One child of a fork, and how long it took from the fork's start until its agent had confirmed."""

    machine: Machine
    ready_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkResult:
    """What a fork made."""

    snapshot: Snapshot
    parent: MachineId | None  # None when a snapshot was forked
    pause_ms: float  # how long the parent stood still; 0 when it did not run
    children: tuple[Child, ...] = field(default_factory=tuple)
