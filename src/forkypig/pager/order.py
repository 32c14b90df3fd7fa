"""What a packing needs to know besides the memory: plain data, from hostd to the packer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from forkypig.model import Shape, SnapshotId


class Extent(NamedTuple):
    """A range of a disk that a layer holds itself; all in bytes, no alignment needed."""

    guest_offset: int
    length: int
    file_offset: int | None  # in the layer's file; None: it reads as zeros


@dataclass(frozen=True, slots=True)
class DiskLayer:
    """One overlay: what it holds itself, and the file to read that from."""

    path: Path
    extents: Sequence[Extent]


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The image that a disk stands on in the end."""

    id: str
    path: Path  # its disk, raw
    sha256: str  # of the disk, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk as a stack: what no layer holds is of `below`, or of the base; zeros beyond its end."""

    size_bytes: int
    layers: Sequence[DiskLayer]  # top first, without the base and without `below`
    below: SnapshotId | None  # a packed snapshot, on whose disk the lowest layer stands
    base: BaseImage


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOrder:
    """A snapshot to pack. `devices` is the file with its device state, None where there is none."""

    devices: Path | None
    disk: Disk | None
    qemu_build: str
    machine_type: str
    cpu_model: str
    accelerator: str
    shape: Shape
    created_us: int
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
