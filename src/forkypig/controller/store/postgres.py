"""PostgreSQL as the controller's database: its address, its connections, turns between controllers, errors in words.

Writers take turns here too, across all controllers: a transaction that writes begins by taking one advisory lock. So
every block of `Store.write` finds what it would find in one process, and none has to be written to run twice
(docs/decisions/0019-several-controllers.md). A controller that stands still in the middle loses its transaction, and
with it the lock, by a timeout of the server's.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import structlog
from sqlalchemy import event, exc, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from forkypig.controller.store.standing import Standing, Superseded
from forkypig.errors import (
    ForkyError,
    HostUnreachable,
    InternalError,
    InvalidRequest,
    NotPossibleNow,
    ResourceExhausted,
)

log = structlog.get_logger()

_TURN = 0x666F726B79  # "forky": the key of the advisory lock
_TAKE_TURN = f"SELECT pg_advisory_xact_lock({_TURN})"
# Each statement sees what is committed when it begins, whatever the server's own default.
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
_NEED_NOT_LAST = "SET LOCAL synchronous_commit = off"
_BEGIN_VIEW = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_CONNECT_S = 5.0
# Blocks of transactions take milliseconds; one that waits for the turn of several others takes more.
_TURN_S = 10
_COMMAND_S = 20.0  # a server that stands still is given up; longer than the turn is waited for
# A controller whose event loop stands still for so long holds up the others no longer.
_IDLE_S = 4
_MIGRATE_S = 120
_POOL = 10


def address(text_url: str) -> URL:
    """`postgresql://…` as SQLAlchemy's driver takes it. Raises InvalidRequest for what is not PostgreSQL's."""
    hint = "write postgresql://USER@HOST/DATABASE, or leave FORKY_DATABASE empty for SQLite"
    try:
        url = make_url(text_url)
    except (exc.ArgumentError, ValueError) as error:
        raise InvalidRequest(f"FORKY_DATABASE is not a database's URL: {hint}") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise InvalidRequest(f"FORKY_DATABASE names «{url.get_backend_name()}», which is not supported: {hint}")
    return url.set(drivername="postgresql+asyncpg")


def shown(url: URL) -> str:
    """The address as it may be shown."""
    return "postgresql://" + url.set(drivername="postgresql").render_as_string(hide_password=True).partition("://")[2]


def engine(url: URL) -> AsyncEngine:
    """Connections; none is made yet. Their transactions are begun and ended here: SQLAlchemy would take a round trip
    to the server for each step of what is one below."""
    made = _engine(url, turn_s=_TURN_S, isolation_level="AUTOCOMMIT")

    @event.listens_for(made.sync_engine, "checkout")
    def taken(connection: Any, _record: Any, _proxy: Any) -> None:
        # A server that was restarted costs a moment, and no call: the driver knows of it without asking.
        if connection.driver_connection.is_closed():
            raise exc.DisconnectionError

    return made


def migration_engine(url: URL) -> AsyncEngine:
    """For the migrations, which another controller may be at already."""
    return _engine(url, turn_s=_MIGRATE_S)


def _engine(url: URL, *, turn_s: int, **options: Any) -> AsyncEngine:
    """`turn_s`: how long a writer waits for the others."""
    settings = {
        "application_name": "forky",
        "timezone": "UTC",
        "jit": "off",
        "lock_timeout": f"{turn_s}s",
        "idle_in_transaction_session_timeout": f"{_IDLE_S}s",
    }
    return create_async_engine(
        url,
        pool_size=_POOL,
        max_overflow=0,
        pool_timeout=_COMMAND_S,
        connect_args={
            "timeout": _CONNECT_S,
            "command_timeout": max(_COMMAND_S, turn_s + 5.0),
            "server_settings": settings,
        },
        **options,
    )


async def take_turn(connection: AsyncConnection) -> None:
    """From here to the end of the transaction no other controller writes."""
    await connection.execute(text(_TAKE_TURN))


# -- transactions ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def transaction(connection: AsyncConnection, *also: str) -> AsyncIterator[str]:
    """All of the block or nothing of it. Gives what the server said to the last of the statements in `also`, which
    are sent together with the first."""
    driver = _driver(connection)
    told = await _tell(connection, "; ".join((_BEGIN, *also)))
    yield told
    if await _tell(connection, "COMMIT") != "COMMIT":
        # The server takes back what has met an error, and says no more than that.
        raise InternalError(
            f"a transaction that had failed was to be committed (server process {driver.get_server_pid()})"
        )


@contextlib.asynccontextmanager
async def turn(connection: AsyncConnection, standing: Standing | None, *, lasts: bool) -> AsyncIterator[None]:
    """A transaction in which no other controller writes. Raises Superseded where `standing` does not hold any more:
    that is looked at in a statement of its own after the turn was taken, which sees what was committed until then.
    `lasts`: it is on the server's disk when it is committed."""
    also = [_TAKE_TURN] if lasts else [_NEED_NOT_LAST, _TAKE_TURN]
    if standing is not None:
        name = standing.name.replace("'", "''")
        also.append(f"SELECT 1 FROM leases WHERE name = '{name}' AND fencing = {standing.number}")  # noqa: S608
    async with transaction(connection, *also) as told:
        if standing is not None and told != "SELECT 1":
            raise Superseded
        yield


@contextlib.asynccontextmanager
async def view(connection: AsyncConnection) -> AsyncIterator[None]:
    """All statements of the block see the same state. It ends when the connection is given back."""
    await _tell(connection, _BEGIN_VIEW)
    yield


async def give_back(connection: AsyncConnection) -> None:
    """Whatever became of its transaction."""
    if is_under_way(connection):
        await _tell(connection, "ROLLBACK")
    await connection.close()


def is_under_way(connection: AsyncConnection) -> bool:
    """Whether a transaction of it is."""
    if connection.invalidated or (driver := _driver(connection)).is_closed():
        return False
    return bool(driver.is_in_transaction())


def _driver(connection: AsyncConnection) -> Any:
    assert connection.sync_connection is not None
    return connection.sync_connection.connection.driver_connection


async def _tell(connection: AsyncConnection, statements: str) -> str:
    """Past SQLAlchemy: what the server says to the last of them."""
    told: str = await tell(connection, _driver(connection).execute, statements)
    return told


async def tell(connection: AsyncConnection, how: Callable[..., Awaitable[Any]], *what: Any) -> Any:
    """Past SQLAlchemy, by a method of the driver's: what the server says."""
    try:
        return await how(*what)
    except asyncpg.PostgresError:
        raise  # it has answered; the transaction is ended when the connection is given back
    except asyncpg.InternalClientError as error:
        # What the driver says between the server's last word and the end of the connection.
        await connection.invalidate()
        raise ConnectionResetError("it has ended the connection") from error
    except BaseException:
        # The server may be at it still: nobody else is to have this connection.
        await connection.invalidate()
        raise


def in_words(where: str, error: Exception) -> ForkyError:
    """The error as ours; `where`: the address without its password."""
    cause: Any = getattr(error, "orig", None) or error
    state = str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")
    told = str(cause).partition(": ")[2].partition("\n")[0] if str(cause).startswith("<class") else str(cause)
    told = told or type(cause).__name__
    for begins, cls, words in _WORDS:
        if state and state.startswith(begins):
            return cls(words.format(where=where, told=told))
    if not state and (_is_connection_lost(error, cause) or isinstance(cause, OSError | TimeoutError)):
        return _gone(where, told)
    log.error("database error", database=where, state=state, exc_info=error)
    return InternalError(f"the controller's database {where} failed: {told}")


def _is_connection_lost(error: Exception, cause: Any) -> bool:
    return (
        isinstance(error, exc.TimeoutError | asyncio.TimeoutError)
        or bool(getattr(error, "connection_invalidated", False))
        or "connection" in str(cause).lower()
    )


_GONE = (
    "the controller's database {where} can't be reached ({told}): machines run on; see that PostgreSQL runs and that "
    "FORKY_DATABASE is right, then try again"
)


def _gone(where: str, told: str) -> HostUnreachable:
    return HostUnreachable(_GONE.format(where=where, told=told))


# By the beginning of the SQLSTATE, the first that fits (https://www.postgresql.org/docs/15/errcodes-appendix.html).
_WORDS: tuple[tuple[tuple[str, ...], type[ForkyError], str], ...] = (
    (("08", "57P"), HostUnreachable, _GONE),
    (
        ("53100", "58030"),
        ResourceExhausted,
        "the disk of the controller's database {where} is full ({told}): free space there and try again",
    ),
    (
        ("53300",),
        ResourceExhausted,
        "the controller's database {where} has no connection to spare ({told}): raise its max_connections",
    ),
    (("53",), ResourceExhausted, "the server of the controller's database {where} ran out of something: {told}"),
    (("28",), InvalidRequest, "the controller's database {where} refuses the login ({told}): correct FORKY_DATABASE"),
    (("3D000",), InvalidRequest, "there is no database {where} ({told}): create it, or correct FORKY_DATABASE"),
    (
        ("42501",),
        InvalidRequest,
        "the user of {where} may not do what the controller needs ({told}): make it the owner of the database",
    ),
    (
        ("25006",),
        NotPossibleNow,
        "{where} is a copy that can't be written ({told}): name the primary in FORKY_DATABASE",
    ),
    (
        ("55P03", "40", "25P03", "57014"),
        NotPossibleNow,
        "others have kept the controller's database {where} busy for too long ({told}): try again",
    ),
    (("22021",), InvalidRequest, "text with a NUL character can't be kept: leave it out"),
    (
        ("XX001", "XX002"),
        InternalError,
        "the controller's database {where} is damaged ({told}): its server's log says more",
    ),
)
