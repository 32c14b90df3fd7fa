"""Quotas: what a tenant has, and whether it may have more. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import fields

from forkypig.errors import ResourceExhausted
from forkypig.model import Machine, MachineId, MachineState, Shape, Snapshot, SnapshotKind
from forkypig.model.tenants import Quota, Tenant, Usage

_WITHOUT_QEMU = (MachineState.STOPPED, MachineState.HIBERNATED, MachineState.FAILED)

# What it is in words, with the unit, and what makes room.
_WORDS = {
    "machines": ("machines", "remove machines (forky rm)"),
    "cpus": ("vCPUs of running machines", "stop, hibernate or remove machines"),
    "memory_mib": ("MiB of memory of running machines", "stop, hibernate or remove machines"),
    "disk_mib": ("MiB of disk", "remove machines or snapshots"),
    "snapshots": ("snapshots", "remove snapshots (forky rm)"),
    "forks_per_minute": ("forks per minute", "wait a minute"),
}


def usage(
    machines: Iterable[Machine],
    snapshots: Iterable[Snapshot],
    *,
    starting: Collection[MachineId] = (),
    pending_snapshots: int = 0,
    recent_forks: int = 0,
) -> Usage:
    """What a tenant's machines and snapshots come to. `starting`: machines that have no QEMU and are about to;
    `pending_snapshots` are being taken; `recent_forks` began within the last minute."""
    machines, snapshots = list(machines), list(snapshots)
    active = [m for m in machines if m.state not in _WITHOUT_QEMU or m.id in starting]
    held_bytes = sum(s.own_disk_bytes + s.own_memory_bytes for s in snapshots if s.kind is not SnapshotKind.TEMPLATE)
    return Usage(
        machines=len(machines),
        cpus=sum(m.shape.cpus for m in active),
        memory_mib=sum(m.shape.memory_mib for m in active),
        disk_mib=sum(m.shape.disk_mib for m in machines) + (held_bytes >> 20),
        snapshots=sum(s.kind is SnapshotKind.KEPT for s in snapshots) + pending_snapshots,
        forks_per_minute=recent_forks,
    )


def of_machines(shape: Shape, count: int, *, forks: int = 0) -> Usage:
    """What `count` new machines of a shape add."""
    return Usage(
        machines=count,
        cpus=count * shape.cpus,
        memory_mib=count * shape.memory_mib,
        disk_mib=count * shape.disk_mib,
        forks_per_minute=forks,
    )


def of_start(shape: Shape) -> Usage:
    """What a machine adds that has no QEMU and gets one."""
    return Usage(cpus=shape.cpus, memory_mib=shape.memory_mib)


def check_quota(tenant: Tenant, used: Usage, added: Usage) -> None:
    """Raises ResourceExhausted, saying which quota, what is used and what is allowed, where `added` would be too much.

    What adds nothing to a quota is not stopped by it, however little of it is left."""
    for each in fields(Quota):
        allowed, more = getattr(tenant.quota, each.name), getattr(added, each.name)
        has = getattr(used, each.name)
        if allowed is not None and more and has + more > allowed:
            what, remedy = _WORDS[each.name]
            raise ResourceExhausted(
                f"tenant «{tenant.name}» has a quota of {allowed} {what}, uses {has} and would need {more} more: "
                f"{remedy}, or have the operator raise it"
            )
