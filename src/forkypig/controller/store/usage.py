"""What a tenant has, added up by the database: a tenant of ten thousand machines is asked about at every fork."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, String, bindparam, case, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.intents import OPEN
from forkypig.controller.store.tables import machines, operations, snapshots
from forkypig.core.intents import IntentKind
from forkypig.model import MachineId, MachineState, SnapshotKind
from forkypig.model.tenants import Usage

_WITHOUT_QEMU = [state.value for state in (MachineState.STOPPED, MachineState.HIBERNATED, MachineState.FAILED)]


def _sum_where(condition: ColumnElement[bool], value: Any) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, value), else_=0)), 0)


_tenant = bindparam("tenant", type_=String)
_m, _s, _o = machines.c, snapshots.c, operations.c
_active = or_(_m.state.not_in(_WITHOUT_QEMU), _m.id.in_(bindparam("starting", expanding=True)))
_of_machines = (
    select(
        func.count().label("machines"),
        _sum_where(_active, _m.cpus).label("cpus"),
        _sum_where(_active, _m.memory_mib).label("memory_mib"),
        func.coalesce(func.sum(_m.disk_mib), 0).label("disk_mib"),
    )
    .where(_m.tenant == _tenant)
    .subquery()
)
_of_snapshots = (
    select(
        _sum_where(_s.kind == SnapshotKind.KEPT.value, 1).label("kept"),
        _sum_where(_s.kind != SnapshotKind.TEMPLATE.value, _s.own_disk_bytes + _s.own_memory_bytes).label("held_bytes"),
    )
    .where(_s.tenant == _tenant)
    .subquery()
)
_forks = (
    select(func.count().label("recent"))
    .where(_o.tenant == _tenant, _o.started_us > bindparam("since_us"), _o.kind == IntentKind.FORK.value)
    .subquery()
)
_pending = (
    select(func.count().label("pending"))
    .where(_o.tenant == _tenant, _o.status.in_(OPEN), _o.kind == IntentKind.SNAPSHOT.value)
    .subquery()
)
# Each of them is one row.
_USAGE = select(_of_machines, _of_snapshots, _forks, _pending).select_from(
    _of_machines.join(_of_snapshots, true()).join(_forks, true()).join(_pending, true())
)


async def of_tenant(
    connection: AsyncConnection,
    tenant: str,
    *,
    starting: Collection[MachineId] = (),
    forks_since_us: int,
) -> Usage:
    """`starting`: machines that have no QEMU and are about to; `forks_since_us`: from when on forks are counted,
    whatever became of them. Snapshots that are being taken count too."""
    asked = {"tenant": tenant, "starting": list(starting), "since_us": forks_since_us}
    row = (await connection.execute(_USAGE, asked)).one()
    return Usage(
        machines=row.machines,
        cpus=int(row.cpus),
        memory_mib=int(row.memory_mib),
        disk_mib=int(row.disk_mib) + (int(row.held_bytes) >> 20),
        snapshots=int(row.kept) + row.pending,
        forks_per_minute=row.recent,
    )
