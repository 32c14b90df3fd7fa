"""Rows of operations: what was asked for, before, while and after it is done."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Text, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller import retried
from forkypig.controller.principal import principal
from forkypig.controller.store import answers
from forkypig.controller.store.engine import owner_of
from forkypig.controller.store.prepared import Prepared, Write, run_all
from forkypig.controller.store.tables import operations as table
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.daemon.server import now_us
from forkypig.errors import Busy
from forkypig.model import MachineId, SnapshotId

_GIVEN = [c.name for c in table.columns if c.name not in ("id", "ended_us")]
_ADD = Prepared(insert(table).values({name: bindparam(name) for name in _GIVEN}).returning(table.c.id))
_END = Prepared(
    update(table)
    .where(table.c.id == bindparam("wanted"))
    .values(
        status=bindparam("new_status"),
        error=case((bindparam("new_error", type_=Text) == "", table.c.error), else_=bindparam("new_error", type_=Text)),
        ended_us=func.coalesce(bindparam("now_us", type_=BigInteger), table.c.ended_us),
    )
)
OPEN = (IntentStatus.OPEN.value, IntentStatus.UNDOING.value)
_ABOUT = Prepared(
    select(table)
    .where(
        or_(*(table.c.status == status for status in OPEN)),
        or_(
            table.c.source == bindparam("thing"),
            table.c.snapshot == bindparam("thing"),
            table.c.machines.like(bindparam("among")),
        ),
    )
    .order_by(table.c.id)
)
# Ended operations are kept for those who look for what happened, and for machines of undone ones that turn up late.
KEPT = 2_000
_COUNTED_US = 60_000_000  # the quota of forks per minute counts them
_TRIM_EVERY = 100  # so that there are this many more at most


def _intent(row: Any) -> Intent:
    return Intent(
        id=row.id,
        kind=IntentKind(row.kind),
        status=IntentStatus(row.status),
        machines=tuple(MachineId(m) for m in json.loads(row.machines)),
        snapshot=SnapshotId(row.snapshot) if row.snapshot else None,
        source=MachineId(row.source) if row.source else None,
        arguments=json.loads(row.arguments),
        tenant=row.tenant,
        owner=row.owner,
    )


async def add(
    connection: AsyncConnection,
    kind: IntentKind,
    *,
    machines: Sequence[MachineId] = (),
    snapshot: SnapshotId | None = None,
    source: MachineId | None = None,
    tenant: str | None = None,
    along: Sequence[Write] = (),
    **arguments: str | float | bool,
) -> Intent:
    """Writes down what is going to be done, by the controller whose transaction it is, and which request of a caller it
    is, where that can come again. `tenant` None: that of whoever asks. `along`: what else is
    written, in the same message to the database."""
    owner, whose = owner_of(connection), principal().tenant if tenant is None else tenant
    now = now_us()
    asked = retried.take(kind)
    values: dict[str, Any] = {
        "kind": kind.value,
        "status": IntentStatus.OPEN.value,
        "machines": json.dumps(machines),
        "snapshot": snapshot,
        "source": source,
        "arguments": json.dumps(arguments),
        "error": "",
        "started_us": now,
        "tenant": whose,
        "owner": owner,
        "request": asked.request if asked else None,
        "content_sha256": asked.content_sha256 if asked else None,
    }
    if asked is not None and not asked.is_new:  # one that was undone has made nothing; the request is asked anew
        await connection.execute(
            update(table)
            .where(table.c.request == asked.request, table.c.status == IntentStatus.UNDONE.value)
            .values(request=None)
        )
    try:
        [(number,)] = await run_all(connection, [*along, Write(_ADD, values)])
    except IntegrityError as error:
        raise Busy("this request", "another controller has taken it up") from error
    if number % _TRIM_EVERY == 0:
        old = (table.c.id <= number - KEPT) & (table.c.started_us < now - _COUNTED_US)
        await connection.execute(delete(table).where(old, table.c.status.not_in(OPEN)))
        await answers.trim(connection, now)
    return Intent(
        id=number,
        kind=kind,
        machines=tuple(machines),
        snapshot=snapshot,
        source=source,
        arguments=arguments,
        tenant=whose,
        owner=owner,
    )


async def of_request(connection: AsyncConnection, request: str) -> tuple[Intent, str] | None:
    """The operation that a request has begun, and the hash of what was asked; None where there is none."""
    row = (await connection.execute(select(table).where(table.c.request == request))).one_or_none()
    return (_intent(row), row.content_sha256) if row is not None else None


async def end(connection: AsyncConnection, intent: Intent, status: IntentStatus, error: str = "") -> None:
    """DONE, UNDONE, or UNDOING with the reason."""
    await ending(intent, status, error).run(connection)


def ending(intent: Intent, status: IntentStatus, error: str = "") -> Write:
    """As `end`, to be run with others."""
    values: dict[str, Any] = {"wanted": intent.id, "new_status": status.value, "new_error": error, "now_us": None}
    if status is not IntentStatus.UNDOING:
        values["now_us"] = now_us()
    return Write(_END, values)


async def release(connection: AsyncConnection, intent: Intent, status: IntentStatus) -> None:
    """Nobody is at it any more: up to the controller that reconciles."""
    still = (table.c.id == intent.id) & table.c.status.in_(OPEN)
    await connection.execute(update(table).where(still).values(owner=None, status=status.value))


async def newest(connection: AsyncConnection) -> int:
    """The highest number that was given; 0 before the first."""
    return int((await connection.execute(select(func.max(table.c.id)))).scalar_one() or 0)


async def names_since(connection: AsyncConnection, number: int) -> set[str]:
    """What the operations that were begun after that number are about, ended or not."""
    rows = await connection.execute(select(table).where(table.c.id > number))
    return {name for row in rows for name in _intent(row).names}


async def unfinished(connection: AsyncConnection, **only: Any) -> list[Intent]:
    """Those that are open or being undone, oldest first. `only`: those in which a column is this, as in kind="fork"."""
    wanted = [table.c[column] == value for column, value in only.items()]
    rows = await connection.execute(select(table).where(table.c.status.in_(OPEN), *wanted).order_by(table.c.id))
    return [_intent(row) for row in rows]


async def unfinished_about(connection: AsyncConnection, thing: str) -> list[Intent]:
    """Those of them that are about this id, oldest first."""
    return [_intent(row) for row in await _ABOUT.run(connection, thing=thing, among=f'%"{thing}"%')]


async def undone_ids(connection: AsyncConnection) -> frozenset[str]:
    """What the undone ones would have made."""
    rows = await connection.execute(select(table).where(table.c.status == IntentStatus.UNDONE.value))
    return frozenset(made for row in rows for made in _intent(row).makes)
