"""What can be asked for at all: counts, sizes, shapes. Every refusal is a sentence with what to do instead."""

from forkypig.errors import InvalidRequest
from forkypig.model import Image, Shape

MOST_CHILDREN = 1000
MOST_CPUS = 64
LEAST_MEMORY_MIB = 128  # below it a Debian kernel and its initramfs do not unpack
MOST_DISK_MIB = 16 << 20  # 16 TiB


def check_count(count: int) -> None:
    """Raises InvalidRequest unless 1 ≤ count ≤ 1000."""
    if count < 1:
        raise InvalidRequest("a fork needs at least one child: use -n 1 or more")
    if count > MOST_CHILDREN:
        raise InvalidRequest(f"a fork makes at most {MOST_CHILDREN} children, not {count}: fork several times")


def with_defaults(shape: Shape) -> Shape:
    """The shape with zeros replaced by the defaults (1 CPU, 512 MiB of memory, 4096 MiB of disk)."""
    usual = Shape()
    return Shape(
        cpus=shape.cpus or usual.cpus,
        memory_mib=shape.memory_mib or usual.memory_mib,
        disk_mib=shape.disk_mib or usual.disk_mib,
    )


def check_shape(shape: Shape, host_memory_mib: int) -> None:
    """Raises InvalidRequest where no machine of this shape can run on a host with `host_memory_mib` (0: not known)."""
    if not 1 <= shape.cpus <= MOST_CPUS:
        raise InvalidRequest(f"a machine can have 1 to {MOST_CPUS} CPUs, not {shape.cpus}: choose --cpus in that range")
    if shape.memory_mib < LEAST_MEMORY_MIB:
        raise InvalidRequest(
            f"a machine needs at least {LEAST_MEMORY_MIB} MiB of memory, not {shape.memory_mib}: use more with --memory"
        )
    if host_memory_mib and shape.memory_mib > host_memory_mib:
        raise InvalidRequest(
            f"a machine with {shape.memory_mib} MiB of memory does not fit on this host, which has {host_memory_mib} "
            "MiB: use less with --memory"
        )
    if not 1 <= shape.disk_mib <= MOST_DISK_MIB:
        raise InvalidRequest(f"a disk can have 1 MiB to 16 TiB, not {shape.disk_mib} MiB: choose --disk in that range")


def check_disk_holds(shape: Shape, image: Image) -> None:
    """Raises InvalidRequest where the disk is smaller than the image."""
    if shape.disk_mib << 20 < image.size_bytes:
        least = -(-image.size_bytes >> 20)
        raise InvalidRequest(
            f"a disk of {shape.disk_mib} MiB can't hold image «{image.name}» ({least} MiB): use --disk {least}M or more"
        )
