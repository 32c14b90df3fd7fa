"""Rows of machines."""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, bindparam, delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.prepared import Prepared, Write
from forkypig.controller.store.tables import machines as table
from forkypig.model import ImageId, Machine, MachineConfig, MachineId, MachineState, PoolId, Shape, SnapshotId

_config = TypeAdapter(MachineConfig)
_AT_ONCE = 500  # rows in one statement, which a server has a few seconds for
_OTHERS = ("id", "pool")  # the columns that a row is not saved with

# Made once: to put a statement together takes longer than to run it.
_BY_ID = Prepared(select(table).where(table.c.id == bindparam("wanted")))
_ONE_OF_TENANT = Prepared(select(table).where(table.c.id == bindparam("wanted"), table.c.tenant == bindparam("whose")))
_BY_NAME = Prepared(select(table).where(table.c.tenant == bindparam("whose"), table.c.name == bindparam("wanted")))
_NEW: dict[str, Any] = {c.name: bindparam(f"new_{c.name}") for c in table.columns if c.name not in _OTHERS}
_SAVE = update(table).where(table.c.id == bindparam("row_id")).values(_NEW)
_SAVE_ONE = Prepared(_SAVE)


def _values(machine: Machine) -> dict[str, Any]:
    return {
        "id": machine.id,
        "name": machine.name,
        "state": machine.state.value,
        "image": machine.image,
        "image_name": machine.image_name,
        "cpus": machine.shape.cpus,
        "memory_mib": machine.shape.memory_mib,
        "disk_mib": machine.shape.disk_mib,
        "snapshot": machine.snapshot,
        "parent": machine.parent,
        "qemu_pid": machine.qemu_pid,
        "address": machine.address,
        "failure": machine.failure,
        "accelerator": machine.accelerator,
        "accelerator_reason": machine.accelerator_reason,
        "created_us": machine.created_us,
        "tenant": machine.tenant,
        "config": _config.dump_json(machine.config).decode(),
    }


def machine_of(row: Any) -> Machine:
    """What a row says."""
    return Machine(
        id=MachineId(row.id),
        name=row.name,
        state=MachineState(row.state),
        image=ImageId(row.image),
        image_name=row.image_name,
        shape=Shape(row.cpus, row.memory_mib, row.disk_mib),
        snapshot=SnapshotId(row.snapshot) if row.snapshot else None,
        parent=MachineId(row.parent) if row.parent else None,
        qemu_pid=row.qemu_pid,
        address=row.address,
        failure=row.failure,
        accelerator=row.accelerator,
        accelerator_reason=row.accelerator_reason,
        created_us=row.created_us,
        config=_config.validate_json(row.config),
        pool=PoolId(row.pool) if row.pool else None,
        tenant=row.tenant,
    )


async def get(connection: AsyncConnection, machine: str) -> Machine | None:
    """By id."""
    rows = await _BY_ID.run(connection, wanted=machine)
    return machine_of(rows[0]) if rows else None


async def one_of_tenant(connection: AsyncConnection, tenant: str, machine: str) -> Machine | None:
    """By id, if it is the tenant's. Another's takes no longer than none: its row is not read."""
    rows = await _ONE_OF_TENANT.run(connection, whose=tenant, wanted=machine)
    return machine_of(rows[0]) if rows else None


async def by_name(connection: AsyncConnection, tenant: str, name: str) -> Machine | None:
    rows = await _BY_NAME.run(connection, whose=tenant, wanted=name)
    return machine_of(rows[0]) if rows else None


async def every(connection: AsyncConnection) -> list[Machine]:
    """All of them, of all tenants, oldest first."""
    rows = await connection.execute(select(table).order_by(table.c.created_us, table.c.id))
    return [machine_of(row) for row in rows]


async def in_pools(connection: AsyncConnection) -> list[Machine]:
    """Those that wait to be acquired, oldest first."""
    rows = await connection.execute(
        select(table).where(table.c.pool.is_not(None)).order_by(table.c.created_us, table.c.id)
    )
    return [machine_of(row) for row in rows]


async def of_tenant(connection: AsyncConnection, tenant: str) -> list[Machine]:
    """A tenant's, also those that wait in its pools, oldest first."""
    rows = await connection.execute(
        select(table).where(table.c.tenant == tenant).order_by(table.c.created_us, table.c.id)
    )
    return [machine_of(row) for row in rows]


async def page(
    connection: AsyncConnection,
    tenant: str,
    *,
    limit: int,
    after: tuple[int, str] | None = None,
    name_prefix: str = "",
) -> list[Machine]:
    """At most `limit` of a tenant's, oldest first (0: all), after a time of creation and an id. `name_prefix`: those
    whose name begins so. Those that wait in pools are nobody's yet, and left out."""
    asked = select(table).where(table.c.tenant == tenant, table.c.pool.is_(None))
    asked = asked.order_by(table.c.created_us, table.c.id)
    if limit:
        asked = asked.limit(limit)
    if after is not None:
        asked = asked.where(tuple_(table.c.created_us, table.c.id) > tuple_(*after))
    if name_prefix:
        asked = asked.where(*_begins(name_prefix))
    return [machine_of(row) for row in await connection.execute(asked)]


async def on(connection: AsyncConnection, snapshot: SnapshotId) -> list[Machine]:
    """Those that stand on a snapshot, whosever they are."""
    return [machine_of(row) for row in await connection.execute(select(table).where(table.c.snapshot == snapshot))]


async def names(connection: AsyncConnection, tenant: str, prefix: str) -> set[str]:
    """The names that are taken in a tenant and begin so."""
    asked = select(table.c.name).where(table.c.tenant == tenant, *_begins(prefix))
    return set((await connection.execute(asked)).scalars())


async def names_of(connection: AsyncConnection, tenant: str) -> set[str]:
    """What a tenant's machines are called."""
    return set((await connection.execute(select(table.c.name).where(table.c.tenant == tenant))).scalars())


def _begins(prefix: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """As a range, which an index serves: names are compared by their bytes, and are ASCII."""
    return table.c.name >= prefix, table.c.name < prefix[:-1] + chr(ord(prefix[-1]) + 1)


async def count(connection: AsyncConnection, tenant: str) -> int:
    found = await connection.execute(select(func.count()).select_from(table).where(table.c.tenant == tenant))
    return int(found.scalar_one())


async def add(connection: AsyncConnection, machines: Sequence[Machine]) -> None:
    """New rows. Raises sqlalchemy.exc.IntegrityError where a name or an id is taken."""
    for first in range(0, len(machines), _AT_ONCE):
        await connection.execute(insert(table), [_values(machine) for machine in machines[first : first + _AT_ONCE]])


async def save(connection: AsyncConnection, machines: Iterable[Machine]) -> None:
    """Rows that are there are replaced, others made."""
    for machine in machines:
        values = _values(machine)
        done = await connection.execute(update(table).where(table.c.id == machine.id).values(values))
        if done.rowcount == 0:
            await connection.execute(insert(table), [values])


async def save_known(connection: AsyncConnection, machines: Sequence[Machine]) -> None:
    """Replaces rows that are there, many at once; those that are not there stay away."""
    for first in range(0, len(machines), _AT_ONCE):
        await connection.execute(_SAVE, [_new_values(machine) for machine in machines[first : first + _AT_ONCE]])


def saving(machine: Machine) -> Write:
    """As `save_known`, of one, to be run with others."""
    return Write(_SAVE_ONE, _new_values(machine))


def _new_values(machine: Machine) -> dict[str, Any]:
    return {"row_id": machine.id, **{f"new_{k}": v for k, v in _values(machine).items() if k != "id"}}


async def set_snapshot(connection: AsyncConnection, machine: MachineId, snapshot: SnapshotId) -> None:
    """It stands on another snapshot now."""
    await connection.execute(update(table).where(table.c.id == machine).values(snapshot=snapshot))


async def set_state(connection: AsyncConnection, machine: MachineId, state: MachineState) -> None:
    await connection.execute(update(table).where(table.c.id == machine).values(state=state.value))


async def delete_all(connection: AsyncConnection, machines: Iterable[MachineId]) -> None:
    """Ids that are not there are fine."""
    for machine in machines:
        await connection.execute(delete(table).where(table.c.id == machine))
