"""Rows of images: a mirror of what the host has."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

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


async def find(connection: AsyncConnection, image: str) -> Image | None:
    """By id, or by name the newest of that name."""
    found = await connection.execute(
        select(table)
        .where((table.c.id == image) | (table.c.name == image))
        .order_by(table.c.created_us.desc())
        .limit(1)
    )
    row = found.first()
    return _image(row) if row else None


async def every(connection: AsyncConnection) -> list[Image]:
    """All of them, oldest first."""
    rows = await connection.execute(select(table).order_by(table.c.created_us, table.c.id))
    return [_image(row) for row in rows]


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
    await connection.execute(delete(table).where(table.c.id == image))
