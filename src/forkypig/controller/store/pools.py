"""Rows of pools and of leases, and which machines wait in which pool."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.machines import machine_of
from forkypig.controller.store.prepared import Prepared, Write
from forkypig.controller.store.tables import machines, pool_leases
from forkypig.controller.store.tables import pools as table
from forkypig.model import (
    ImageId,
    Lease,
    Machine,
    MachineConfig,
    MachineId,
    MachineState,
    Pool,
    PoolId,
    Shape,
    SnapshotId,
)

_config = TypeAdapter(MachineConfig)

# Made once: to put a statement together takes longer than to run it, and somebody waits for these.
_CLAIM = Prepared(
    update(machines)
    .where(
        machines.c.id == bindparam("wanted"),
        machines.c.pool == bindparam("of_pool"),
        machines.c.state == MachineState.PAUSED.value,
    )
    .values(pool=None, state=MachineState.RUNNING.value)
    .returning(machines)
)
_ADD_LEASE = Prepared(insert(pool_leases).values({c.name: bindparam(c.name) for c in pool_leases.columns}))


def _pool(row: Any) -> Pool:
    return Pool(
        id=PoolId(row.id),
        name=row.name,
        tenant=row.tenant,
        source=row.source,
        from_image=row.from_image,
        image=ImageId(row.image),
        snapshot=SnapshotId(row.snapshot) if row.snapshot else None,
        shape=Shape(row.cpus, row.memory_mib, row.disk_mib),
        config=_config.validate_json(row.config),
        target=row.target,
        max=row.most,
        created_us=row.created_us,
    )


async def every(connection: AsyncConnection) -> list[Pool]:
    """All of them, oldest first, also those that are being removed."""
    return [_pool(row) for row in await connection.execute(select(table).order_by(table.c.created_us, table.c.id))]


async def removing(connection: AsyncConnection) -> set[PoolId]:
    rows = await connection.execute(select(table.c.id).where(table.c.removing.is_(True)))
    return {PoolId(row.id) for row in rows}


async def by_name(connection: AsyncConnection, tenant: str, name: str) -> Pool | None:
    """One that is being removed still has its name."""
    found = await connection.execute(select(table).where(table.c.tenant == tenant, table.c.name == name))
    row = found.first()
    return _pool(row) if row else None


async def grounds(connection: AsyncConnection) -> dict[SnapshotId, str]:
    """The snapshots that pools start from, and the name of a pool of each."""
    rows = await connection.execute(
        select(table.c.snapshot, table.c.name).where(table.c.snapshot.is_not(None), table.c.removing.is_(False))
    )
    return {SnapshotId(row.snapshot): row.name for row in rows}


async def add(connection: AsyncConnection, pool: Pool) -> None:
    shape = pool.shape
    values = {
        "id": pool.id,
        "tenant": pool.tenant,
        "name": pool.name,
        "source": pool.source,
        "from_image": pool.from_image,
        "image": pool.image,
        "snapshot": pool.snapshot,
        "cpus": shape.cpus,
        "memory_mib": shape.memory_mib,
        "disk_mib": shape.disk_mib,
        "config": _config.dump_json(pool.config).decode(),
        "target": pool.target,
        "most": pool.max,
        "created_us": pool.created_us,
        "removing": False,
    }
    await connection.execute(insert(table), [values])


async def set_sizes(connection: AsyncConnection, pool: PoolId, target: int, most: int) -> None:
    await connection.execute(update(table).where(table.c.id == pool).values(target=target, most=most))


async def set_snapshot(connection: AsyncConnection, pool: PoolId, snapshot: SnapshotId) -> None:
    await connection.execute(update(table).where(table.c.id == pool).values(snapshot=snapshot))


async def set_removing(connection: AsyncConnection, pool: PoolId) -> None:
    """From now on nothing is made for it and nobody gets a machine of it."""
    await connection.execute(update(table).where(table.c.id == pool).values(removing=True))


async def delete_one(connection: AsyncConnection, pool: PoolId) -> None:
    await connection.execute(delete(table).where(table.c.id == pool))


# -- who waits where ---------------------------------------------------------------------------------------------------


async def put_in(connection: AsyncConnection, pool: PoolId, waiting: Iterable[MachineId]) -> None:
    """These machines wait in the pool, or will when they are made."""
    await connection.execute(update(machines).where(machines.c.id.in_(list(waiting))).values(pool=pool))


async def claim(connection: AsyncConnection, pool: PoolId, machine: MachineId) -> Machine | None:
    """Takes a machine that is ready out of its pool; None: it is not there, or not ready, any more."""
    rows = await _CLAIM.run(connection, wanted=machine, of_pool=pool)
    return machine_of(rows[0]) if rows else None


async def take_out(connection: AsyncConnection, pool: PoolId, machine: MachineId) -> bool:
    """As `claim`, for one that is to go, in whatever state."""
    done = await connection.execute(
        update(machines).where(machines.c.id == machine, machines.c.pool == pool).values(pool=None)
    )
    return bool(done.rowcount)


async def rename(connection: AsyncConnection, machine: MachineId, name: str) -> None:
    """Raises sqlalchemy.exc.IntegrityError where the name is taken."""
    await connection.execute(update(machines).where(machines.c.id == machine).values(name=name))


async def stock(connection: AsyncConnection, pool: PoolId) -> tuple[int, int]:
    """How many machines wait in the pool or are made for it, and how many of it are acquired."""
    waiting = select(func.count()).select_from(machines).where(machines.c.pool == pool)
    acquired = select(func.count()).select_from(pool_leases).where(pool_leases.c.pool == pool)
    return (
        (await connection.execute(waiting)).scalar_one(),
        (await connection.execute(acquired)).scalar_one(),
    )


# -- leases ------------------------------------------------------------------------------------------------------------


def _lease(row: Any) -> Lease:
    return Lease(
        machine=MachineId(row.machine),
        machine_name=row.name,
        pool=PoolId(row.pool),
        pool_name=row.pool_name,
        tenant=row.tenant,
        holder=row.holder,
        labels=dict(row.labels),
        ttl_s=row.ttl_s,
        acquired_us=row.acquired_us,
        expires_us=row.expires_us,
    )


async def leases(connection: AsyncConnection) -> list[Lease]:
    """All of them, oldest first."""
    rows = await connection.execute(
        select(pool_leases, machines.c.name)
        .join(machines, machines.c.id == pool_leases.c.machine)
        .order_by(pool_leases.c.acquired_us, pool_leases.c.machine)
    )
    return [_lease(row) for row in rows]


async def leases_of(connection: AsyncConnection, held: Sequence[MachineId]) -> dict[MachineId, Lease]:
    """Of those of these machines that have one."""
    rows = await connection.execute(
        select(pool_leases, machines.c.name)
        .join(machines, machines.c.id == pool_leases.c.machine)
        .where(pool_leases.c.machine.in_(held))
    )
    return {MachineId(row.machine): _lease(row) for row in rows}


async def lease_of(connection: AsyncConnection, machine: MachineId) -> Lease | None:
    return (await leases_of(connection, [machine])).get(machine)


async def end_lease(connection: AsyncConnection, lease: Lease) -> None:
    """The machine's lease, if it has one, is this one, which is over."""
    await connection.execute(delete(pool_leases).where(pool_leases.c.machine == lease.machine))
    await adding_lease(lease).run(connection)


def adding_lease(lease: Lease) -> Write:
    """Of a machine that has none."""
    values = {
        "machine": lease.machine,
        "pool": lease.pool,
        "pool_name": lease.pool_name,
        "tenant": lease.tenant,
        "holder": lease.holder,
        "labels": json.dumps(dict(lease.labels)),
        "ttl_s": lease.ttl_s,
        "acquired_us": lease.acquired_us,
        "expires_us": lease.expires_us,
    }
    return Write(_ADD_LEASE, values)


async def extend(connection: AsyncConnection, extended: Sequence[Lease]) -> None:
    """Their time to live and their end are these now."""
    for lease in extended:
        await connection.execute(
            update(pool_leases)
            .where(pool_leases.c.machine == lease.machine)
            .values(ttl_s=lease.ttl_s, expires_us=lease.expires_us)
        )
