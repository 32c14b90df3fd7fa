"""Rows of snapshots, and of the templates among them."""

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import machines, shares, templates
from forkypig.controller.store.tables import snapshots as table
from forkypig.model import ImageId, MachineId, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.model.access import EVERY_TENANT

_MOST_ASKED = 1000  # values in one statement

TemplateKey = tuple[ImageId, Shape]


def _values(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "tag": snapshot.tag or None,
        "message": snapshot.message,
        "kind": snapshot.kind.value,
        "parent": snapshot.parent,
        "machine": snapshot.machine,
        "image": snapshot.image,
        "cpus": snapshot.shape.cpus,
        "memory_mib": snapshot.shape.memory_mib,
        "disk_mib": snapshot.shape.disk_mib,
        "machine_type": snapshot.machine_type,
        "qemu_build": snapshot.qemu_build,
        "accelerator": snapshot.accelerator,
        "cpu_model": snapshot.cpu_model,
        "pause_ms": snapshot.pause_ms,
        "own_memory_bytes": snapshot.own_memory_bytes,
        "own_disk_bytes": snapshot.own_disk_bytes,
        "packed": snapshot.packed,
        "created_us": snapshot.created_us,
        "tenant": snapshot.tenant,
    }


def _snapshot(row: Any) -> Snapshot:
    return Snapshot(
        id=SnapshotId(row.id),
        tag=row.tag or "",
        message=row.message,
        kind=SnapshotKind(row.kind),
        parent=SnapshotId(row.parent) if row.parent else None,
        machine=MachineId(row.machine) if row.machine else None,
        image=ImageId(row.image),
        shape=Shape(row.cpus, row.memory_mib, row.disk_mib),
        machine_type=row.machine_type,
        qemu_build=row.qemu_build,
        accelerator=row.accelerator,
        cpu_model=row.cpu_model,
        pause_ms=row.pause_ms,
        own_memory_bytes=row.own_memory_bytes,
        own_disk_bytes=row.own_disk_bytes,
        packed=row.packed,
        created_us=row.created_us,
        tenant=row.tenant,
    )


async def get(connection: AsyncConnection, snapshot: str) -> Snapshot | None:
    """By id; not one that is being removed."""
    found = await connection.execute(select(table).where(table.c.id == snapshot, table.c.removing.is_(False)))
    row = found.first()
    return _snapshot(row) if row else None


async def by_tag(connection: AsyncConnection, tenant: str, tag: str) -> Snapshot | None:
    """A tenant's own; not one that is being removed."""
    found = await connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.tag == tag, table.c.removing.is_(False))
    )
    row = found.first()
    return _snapshot(row) if row else None


async def seen_by(
    connection: AsyncConnection, tenant: str, *, whole: str = "", tag: str = "", prefix: str = ""
) -> list[Snapshot]:
    """What a tenant may start machines from, its own and what others share with it, oldest first; `whole`: the one of
    this id, `tag`: those that are called so, `prefix`: those whose id begins so. Not those that are being removed,
    where one of these is given."""
    query = select(table).where(_seen_by(tenant))
    if whole:
        query = query.where(table.c.id == whole)
    if tag:
        query = query.where(table.c.tag == tag)
    if prefix:
        query = query.where(table.c.id.startswith(prefix, autoescape=True))
    if whole or tag or prefix:
        query = query.where(table.c.removing.is_(False))
    rows = await connection.execute(query.order_by(table.c.created_us, table.c.id))
    return [_snapshot(row) for row in rows]


def _seen_by(tenant: str) -> ColumnElement[bool]:
    return (table.c.tenant == tenant) | table.c.id.in_(_shared_with(tenant))


def _shared_with(tenant: str) -> Select[tuple[str]]:
    return select(shares.c.snapshot).where(shares.c.tenant.in_((tenant, EVERY_TENANT)))


async def sharing(connection: AsyncConnection) -> dict[SnapshotId, tuple[str, ...]]:
    """Whom each shared snapshot is shared with."""
    found: dict[SnapshotId, tuple[str, ...]] = {}
    for row in await connection.execute(select(shares).order_by(shares.c.tenant)):
        found[row.snapshot] = (*found.get(row.snapshot, ()), row.tenant)
    return found


async def share(connection: AsyncConnection, snapshot: SnapshotId, tenant: str) -> None:
    """From now on the tenant sees it (EVERY_TENANT: all do)."""
    await unshare(connection, snapshot, tenant)
    await connection.execute(insert(shares), [{"snapshot": snapshot, "tenant": tenant}])


async def unshare(connection: AsyncConnection, snapshot: SnapshotId, tenant: str) -> bool:
    """Takes it back; whether there was something to take back."""
    same = (shares.c.snapshot == snapshot) & (shares.c.tenant == tenant)
    return bool((await connection.execute(delete(shares).where(same))).rowcount)


async def tag_is_taken(connection: AsyncConnection, tenant: str, tag: str) -> bool:
    found = await connection.execute(select(table.c.id).where(table.c.tenant == tenant, table.c.tag == tag))
    return found.first() is not None


async def every(connection: AsyncConnection) -> list[Snapshot]:
    """All of them, of all tenants, oldest first, also those that are being removed."""
    rows = await connection.execute(select(table).order_by(table.c.created_us, table.c.id))
    return [_snapshot(row) for row in rows]


async def page(
    connection: AsyncConnection, tenant: str, *, limit: int, after: tuple[int, str] | None = None
) -> list[Snapshot]:
    """At most `limit` of those that a tenant sees, oldest first (0: all), after a time of creation and an id."""
    asked = select(table).where(_seen_by(tenant)).order_by(table.c.created_us, table.c.id)
    if limit:
        asked = asked.limit(limit)
    if after is not None:
        asked = asked.where(tuple_(table.c.created_us, table.c.id) > tuple_(*after))
    return [_snapshot(row) for row in await connection.execute(asked)]


async def visible(connection: AsyncConnection, tenant: str, among: Collection[SnapshotId]) -> set[SnapshotId]:
    """Those among these that a tenant sees."""
    asked = select(table.c.id).where(_seen_by(tenant))
    if len(among) <= _MOST_ASKED:
        asked = asked.where(table.c.id.in_(among))
    return {SnapshotId(row.id) for row in await connection.execute(asked)}


async def is_there(connection: AsyncConnection, snapshot: str) -> bool:
    """By id, also one that is being removed."""
    return (await connection.execute(select(table.c.id).where(table.c.id == snapshot))).first() is not None


async def made_of(connection: AsyncConnection, snapshot: SnapshotId) -> list[Snapshot]:
    """Those whose parent it is."""
    return [_snapshot(row) for row in await connection.execute(select(table).where(table.c.parent == snapshot))]


async def count(connection: AsyncConnection, tenant: str) -> int:
    found = await connection.execute(select(func.count()).select_from(table).where(table.c.tenant == tenant))
    return int(found.scalar_one())


async def save(connection: AsyncConnection, snapshots: Iterable[Snapshot]) -> None:
    """Rows that are there are replaced, others made; parents must come first."""
    for snapshot in snapshots:
        values = _values(snapshot)
        done = await connection.execute(update(table).where(table.c.id == snapshot.id).values(values))
        if done.rowcount == 0:
            await connection.execute(insert(table), [{**values, "removing": False}])


async def set_removing(connection: AsyncConnection, snapshot: SnapshotId, *, removing: bool) -> None:
    """From now on nothing new may stand on it; or again."""
    await connection.execute(update(table).where(table.c.id == snapshot).values(removing=removing))


async def removing(connection: AsyncConnection) -> set[SnapshotId]:
    rows = await connection.execute(select(table.c.id).where(table.c.removing.is_(True)))
    return {SnapshotId(row.id) for row in rows}


async def delete_one(connection: AsyncConnection, snapshot: SnapshotId) -> None:
    """Removes the row, and what refers to it forgets it. One that is not there is fine."""
    await connection.execute(delete(templates).where(templates.c.snapshot == snapshot))
    await connection.execute(delete(shares).where(shares.c.snapshot == snapshot))
    await connection.execute(update(machines).where(machines.c.snapshot == snapshot).values(snapshot=None))
    await connection.execute(update(table).where(table.c.parent == snapshot).values(parent=None))
    await connection.execute(delete(table).where(table.c.id == snapshot))


async def template(connection: AsyncConnection, image: ImageId, shape: Shape) -> Snapshot | None:
    """The template of an image and shape, if one is registered."""
    found = await connection.execute(
        select(table)
        .join(templates, templates.c.snapshot == table.c.id)
        .where(
            templates.c.image == image,
            templates.c.cpus == shape.cpus,
            templates.c.memory_mib == shape.memory_mib,
            templates.c.disk_mib == shape.disk_mib,
            table.c.removing.is_(False),
        )
    )
    row = found.first()
    return _snapshot(row) if row else None


async def template_keys(connection: AsyncConnection) -> set[TemplateKey]:
    """What has a template."""
    rows = await connection.execute(select(templates))
    return {(ImageId(row.image), Shape(row.cpus, row.memory_mib, row.disk_mib)) for row in rows}


async def set_template(connection: AsyncConnection, snapshot: Snapshot) -> None:
    """Registers it for its image and shape, in place of another."""
    await unset_template(connection, snapshot.image, snapshot.shape)
    shape = snapshot.shape
    values = {"cpus": shape.cpus, "memory_mib": shape.memory_mib, "disk_mib": shape.disk_mib}
    await connection.execute(insert(templates), [{"image": snapshot.image, "snapshot": snapshot.id, **values}])


async def unset_template(connection: AsyncConnection, image: ImageId, shape: Shape) -> None:
    """Its snapshot is an ordinary one from now on, which goes when nothing stands on it."""
    same = (
        (templates.c.image == image)
        & (templates.c.cpus == shape.cpus)
        & (templates.c.memory_mib == shape.memory_mib)
        & (templates.c.disk_mib == shape.disk_mib)
    )
    old = select(templates.c.snapshot).where(same).scalar_subquery()
    await connection.execute(update(table).where(table.c.id == old).values(kind=SnapshotKind.FORK.value))
    await connection.execute(delete(templates).where(same))


async def tags(connection: AsyncConnection, tenant: str) -> set[str]:
    """Every tag that a tenant's snapshots have."""
    asked = select(table.c.tag).where(table.c.tag.is_not(None), table.c.tenant == tenant)
    return set((await connection.execute(asked)).scalars())
