"""Tenants: whose things there are, how many they may have, and how many they have."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What a tenant may have. None: as much as the host has."""

    machines: int | None = None  # in any state
    cpus: int | None = None  # of machines that have a QEMU, or are about to
    memory_mib: int | None = None  # of the same, by their shapes
    disk_mib: int | None = None  # of machines, by their shapes, and what snapshots hold
    snapshots: int | None = None  # that were asked for; those that come with a fork are not counted
    forks_per_minute: int | None = None

    def limits(self) -> tuple[int | None, ...]:
        """All of them."""
        return tuple(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a tenant has; as Quota."""

    machines: int = 0
    cpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    snapshots: int = 0
    forks_per_minute: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose things there are."""

    name: str
    created_us: int = 0
    quota: Quota = Quota()
    ksm: bool = False  # its machines' memory is merged where it is equal
