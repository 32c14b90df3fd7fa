"""Rows of answers: what was answered to requests that may come again, for a day."""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import answers as table

KEPT_US = 24 * 3600 * 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    content_sha256: str  # of what was asked
    answer: bytes  # serialised


async def get(connection: AsyncConnection, request: str, now_us: int) -> Answer | None:
    """What was answered to this request within the last day."""
    query = select(table).where(table.c.request == request, table.c.time_us > now_us - KEPT_US)
    row = (await connection.execute(query)).one_or_none()
    return Answer(row.content_sha256, row.answer) if row is not None else None


async def keep(connection: AsyncConnection, request: str, answer: Answer, now_us: int) -> None:
    """From now on for a day; those that are older go."""
    await connection.execute(delete(table).where((table.c.time_us <= now_us - KEPT_US) | (table.c.request == request)))
    await connection.execute(
        insert(table).values(
            request=request, content_sha256=answer.content_sha256, answer=answer.answer, time_us=now_us
        )
    )


async def forget(connection: AsyncConnection, request: str) -> None:
    """What was answered holds no more."""
    await connection.execute(delete(table).where(table.c.request == request))
