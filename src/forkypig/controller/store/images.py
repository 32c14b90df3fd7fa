"""Rows of images: a mirror of what the host has."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import image_owners as owners
from forkypig.controller.store.tables import images as table
from forkypig.model import Image, ImageId


def _image(row: Any) -> Image:
    return Image(
        id=ImageId(row.id),
        name=row.name,
        size_bytes=row.size_bytes,
        kernel=row.kernel,
        sha256=row.sha256,
        created_us=row.created_us,
        description=row.description,
        forget_files=tuple(row.forget_files),
    )


def _values(image: Image) -> dict[str, Any]:
    return {**asdict(image), "forget_files": list(image.forget_files)}


def _visible(tenant: str) -> ColumnElement[bool]:
    """Everybody's images, and those that came with the tenant's own imports."""
    return table.c.id.not_in(select(owners.c.image)) | table.c.id.in_(
        select(owners.c.image).where(owners.c.tenant == tenant)
    )


async def find(connection: AsyncConnection, image: str, tenant: str) -> Image | None:
    """One that the tenant sees, by id, or by name the newest of that name."""
    found = await connection.execute(
        select(table)
        .where((table.c.id == image) | (table.c.name == image), _visible(tenant))
        .order_by(table.c.created_us.desc())
        .limit(1)
    )
    row = found.first()
    return _image(row) if row else None


async def every(connection: AsyncConnection) -> list[Image]:
    """All of them, oldest first."""
    rows = await connection.execute(select(table).order_by(table.c.created_us, table.c.id))
    return [_image(row) for row in rows]


async def seen_by(connection: AsyncConnection, tenant: str) -> list[Image]:
    """Those that a tenant sees, oldest first."""
    rows = await connection.execute(select(table).where(_visible(tenant)).order_by(table.c.created_us, table.c.id))
    return [_image(row) for row in rows]


async def owned_by(connection: AsyncConnection, image: ImageId) -> set[str]:
    """The tenants that it came to with an import; none: it is everybody's."""
    return set((await connection.execute(select(owners.c.tenant).where(owners.c.image == image))).scalars())


async def own(connection: AsyncConnection, image: ImageId, tenant: str) -> None:
    """It has come with the tenant's import too."""
    if tenant not in await owned_by(connection, image):
        await connection.execute(insert(owners), [{"image": image, "tenant": tenant}])


async def disown(connection: AsyncConnection, image: ImageId, tenant: str) -> None:
    """It is no longer the tenant's; others keep it."""
    await connection.execute(delete(owners).where(owners.c.image == image, owners.c.tenant == tenant))


async def replace_all(connection: AsyncConnection, images: Iterable[Image]) -> None:
    """From now on these are the images."""
    values = [_values(image) for image in images]
    await connection.execute(delete(table))
    if values:
        await connection.execute(insert(table), values)


async def save(connection: AsyncConnection, image: Image) -> None:
    await connection.execute(delete(table).where(table.c.id == image.id))
    await connection.execute(insert(table), [_values(image)])


async def delete_one(connection: AsyncConnection, image: ImageId) -> None:
    await connection.execute(delete(owners).where(owners.c.image == image))
    await connection.execute(delete(table).where(table.c.id == image))
