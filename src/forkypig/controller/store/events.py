"""Rows of events: what happened, in order, the newest hundred thousand."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.principal import principal
from forkypig.controller.store.prepared import Prepared, Write, run_all
from forkypig.controller.store.tables import events as table
from forkypig.daemon.server import now_us
from forkypig.model import Event

_GIVEN = ("time_us", "kind", "subject", "detail", "tenant")
_ADD = Prepared(insert(table).values({name: bindparam(name) for name in _GIVEN}).returning(table.c.sequence))
KEPT = 100_000
_TRIM_EVERY = 500  # so that the table is over its limit by this much at most
DEFAULT_LIMIT = 1000
MOST = 10_000


async def add(
    connection: AsyncConnection,
    kind: str,
    subject: str,
    detail: str = "",
    *,
    tenant: str | None = None,
    along: Sequence[Write] = (),
) -> None:
    """Something happened. `tenant` None: that of whoever asks; what the system does by itself says whose it is.
    `along`: what else is written, in the same message to the database."""
    whose = principal().tenant if tenant is None else tenant
    values = {"time_us": now_us(), "kind": kind, "subject": subject, "detail": detail, "tenant": whose}
    [(sequence,)] = await run_all(connection, [*along, Write(_ADD, values)])
    if sequence % _TRIM_EVERY == 0:
        await connection.execute(delete(table).where(table.c.sequence <= sequence - KEPT))


async def after(connection: AsyncConnection, tenant: str, sequence: int, limit: int) -> list[Event]:
    """A tenant's events after `sequence`, oldest first; `limit` 0 means 1000, more than 10,000 never come at once."""
    rows = await connection.execute(
        select(table)
        .where(table.c.sequence > sequence, table.c.tenant == tenant)
        .order_by(table.c.sequence)
        .limit(min(limit or DEFAULT_LIMIT, MOST))
    )
    return [_event(row) for row in rows]


async def every_after(connection: AsyncConnection, sequence: int) -> list[tuple[Event, str]]:
    """The next 1000 events after `sequence`, oldest first, and whose each is: for whoever has to see gaps."""
    asked = select(table).where(table.c.sequence > sequence).order_by(table.c.sequence).limit(DEFAULT_LIMIT)
    return [(_event(row), row.tenant) for row in await connection.execute(asked)]


def _event(row: Any) -> Event:
    return Event(sequence=row.sequence, time_us=row.time_us, kind=row.kind, subject=row.subject, detail=row.detail)


async def before(connection: AsyncConnection, time_us: int) -> int:
    """The number of the last event before a point in time; 0 where there is none."""
    found = await connection.execute(select(func.max(table.c.sequence)).where(table.c.time_us < time_us))
    return found.scalar_one() or 0
