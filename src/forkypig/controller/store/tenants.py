"""Rows of tenants and their quotas."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import (
    events,
    image_owners,
    images,
    machines,
    operations,
    shares,
    snapshots,
    tokens,
)
from forkypig.controller.store.tables import tenants as table
from forkypig.model.tenants import Quota, Tenant


def _quota(quota: Quota) -> dict[str, Any]:
    return {
        "machines": quota.machines,
        "cpus": quota.cpus,
        "memory_mib": quota.memory_mib,
        "disk_mib": quota.disk_mib,
        "snapshots": quota.snapshots,
        "forks_per_minute": quota.forks_per_minute,
    }


def _tenant(row: Any) -> Tenant:
    quota = Quota(
        machines=row.machines,
        cpus=row.cpus,
        memory_mib=row.memory_mib,
        disk_mib=row.disk_mib,
        snapshots=row.snapshots,
        forks_per_minute=row.forks_per_minute,
    )
    return Tenant(name=row.name, created_us=row.created_us, quota=quota, ksm=row.ksm)


async def get(connection: AsyncConnection, name: str) -> Tenant | None:
    row = (await connection.execute(select(table).where(table.c.name == name))).first()
    return _tenant(row) if row else None


async def lock(connection: AsyncConnection, name: str) -> Tenant | None:
    """As `get`; until the transaction ends nobody else's gets past here. (With SQLite writers take turns anyway.)"""
    row = (await connection.execute(select(table).where(table.c.name == name).with_for_update())).first()
    return _tenant(row) if row else None


async def every(connection: AsyncConnection) -> Sequence[Tenant]:
    """All of them, by name."""
    return [_tenant(row) for row in await connection.execute(select(table).order_by(table.c.name))]


async def add(connection: AsyncConnection, tenant: Tenant) -> None:
    """A new row. Raises sqlalchemy.exc.IntegrityError where the name is taken."""
    values = {"name": tenant.name, "created_us": tenant.created_us, "ksm": tenant.ksm}
    await connection.execute(insert(table), [values | _quota(tenant.quota)])


async def save(connection: AsyncConnection, tenant: Tenant) -> None:
    """Replaces quota and KSM."""
    values = {"ksm": tenant.ksm, **_quota(tenant.quota)}
    await connection.execute(update(table).where(table.c.name == tenant.name).values(values))


async def things(connection: AsyncConnection, name: str) -> dict[str, int]:
    """How many machines, snapshots, images and operations under way are a tenant's."""
    found = {}
    for kind, rows in (("machine", machines), ("snapshot", snapshots)):
        query = select(func.count()).select_from(rows).where(rows.c.tenant == name)
        found[kind] = int((await connection.execute(query)).scalar_one())
    owned = select(image_owners.c.image).where(image_owners.c.tenant == name)
    query = select(func.count()).select_from(images).where(images.c.id.in_(owned))
    found["image"] = int((await connection.execute(query)).scalar_one())
    query = (
        select(func.count()).select_from(operations).where(operations.c.tenant == name, operations.c.ended_us.is_(None))
    )
    found["operation"] = int((await connection.execute(query)).scalar_one())
    return found


async def delete_one(connection: AsyncConnection, name: str) -> None:
    """With its tokens, what others share with it and what was told of it: another of its name begins anew."""
    await connection.execute(delete(shares).where(shares.c.tenant == name))
    await connection.execute(delete(image_owners).where(image_owners.c.tenant == name))
    await connection.execute(delete(events).where(events.c.tenant == name))
    await connection.execute(delete(operations).where(operations.c.tenant == name))
    await connection.execute(delete(tokens).where(tokens.c.tenant == name))
    await connection.execute(delete(table).where(table.c.name == name))
