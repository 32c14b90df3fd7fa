"""Quotas: whether a tenant may have more than it has. Pure."""

from dataclasses import fields

from forkypig.errors import ResourceExhausted
from forkypig.model import Shape
from forkypig.model.tenants import Quota, Tenant, Usage

# What it is in words, with the unit, and what makes room.
_WORDS = {
    "machines": ("machines", "remove machines (forky rm)"),
    "cpus": ("vCPUs of running machines", "stop, hibernate or remove machines"),
    "memory_mib": ("MiB of memory of running machines", "stop, hibernate or remove machines"),
    "disk_mib": ("MiB of disk", "remove machines or snapshots"),
    "snapshots": ("snapshots", "remove snapshots (forky rm)"),
    "forks_per_minute": ("forks per minute", "wait a minute"),
}


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


def of_snapshot() -> Usage:
    """What a snapshot of a machine adds. How much it holds is known when it is packed: whose disk is used up by then
    takes no more of them."""
    return Usage(snapshots=1, disk_mib=1)


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
