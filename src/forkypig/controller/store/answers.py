"""Rows of answers: what was answered to requests that may come again, for a day."""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import BigInteger, bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller import retried
from forkypig.controller.retried import Asked
from forkypig.controller.store.prepared import Prepared, Write
from forkypig.controller.store.tables import answers as table
from forkypig.core.intents import IntentKind
from forkypig.daemon.server import now_us

KEPT_US = 24 * 3600 * 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    content_sha256: str  # of what was asked
    answer: bytes  # serialised


_GET = Prepared(
    select(table).where(
        table.c.request == bindparam("wanted"), table.c.time_us > bindparam("since_us", type_=BigInteger)
    )
)
_ADD = Prepared(insert(table).values({c.name: bindparam(c.name) for c in table.columns}))


async def get(connection: AsyncConnection, request: str, at_us: int) -> Answer | None:
    """What was answered to this request within the last day."""
    rows = await _GET.run(connection, wanted=request, since_us=at_us - KEPT_US)
    return Answer(rows[0].content_sha256, rows[0].answer) if rows else None


async def keep(connection: AsyncConnection, request: str, answer: Answer, at_us: int) -> None:
    """From now on for a day, in place of one that is too old to count."""
    await forget(connection, request)
    await _keeping(request, answer, at_us).run(connection)


async def along(connection: AsyncConnection, kind: IntentKind | None, answer: Callable[[], bytes]) -> list[Write]:
    """What is to be written with the end of an operation that a request has asked for: its answer. Nobody else need
    keep it then. `kind`: as in `Asked`; what is a means to the end of another request keeps nothing."""
    asked = retried.current()
    if asked is None or asked.is_kept or asked.kind is not kind:
        return []
    asked.is_kept = True
    return await of(connection, asked, answer())


async def of(connection: AsyncConnection, asked: Asked, answer: bytes) -> list[Write]:
    """What is to be written when a request has been answered so."""
    kept = Answer(asked.content_sha256, answer)
    if asked.is_new:
        return [_keeping(asked.request, kept, now_us())]
    await keep(connection, asked.request, kept, now_us())
    return []


def _keeping(request: str, answer: Answer, at_us: int) -> Write:
    values = {
        "request": request,
        "content_sha256": answer.content_sha256,
        "answer": answer.answer,
        "time_us": at_us,
    }
    return Write(_ADD, values)


async def trim(connection: AsyncConnection, at_us: int) -> None:
    """Those that are older than a day go."""
    await connection.execute(delete(table).where(table.c.time_us <= at_us - KEPT_US))


async def forget(connection: AsyncConnection, request: str) -> None:
    """What was answered holds no more."""
    await connection.execute(delete(table).where(table.c.request == request))
