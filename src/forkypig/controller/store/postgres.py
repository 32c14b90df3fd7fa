"""PostgreSQL as the controller's database: its address, its connections, turns between controllers, errors in words.

Writers take turns here too, across all controllers: a transaction that writes begins by taking one advisory lock. So
every block of `Store.write` finds what it would find in one process, and none has to be written to run twice
(docs/decisions/0019-several-controllers.md). A controller that stands still in the middle loses its transaction, and
with it the lock, by a timeout of the server's.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import structlog
from sqlalchemy import event, exc, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from forkypig.controller.store.standing import Standing, Superseded
from forkypig.errors import (
    InternalError,
    InvalidRequest,
)

log = structlog.get_logger()

_TURN = 0x666F726B79  # "forky": the key of the advisory lock
_TAKE_TURN = f"SELECT pg_advisory_xact_lock({_TURN})"
# Each statement sees what is committed when it begins, whatever the server's own default.
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
_NEED_NOT_LAST = "SET LOCAL synchronous_commit = off"
_BEGIN_VIEW = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# A server that stands still is given up after so long; blocks of transactions take milliseconds.
_CONNECT_S = 5.0
_COMMAND_S = 5.0
_COMMIT_S = 20.0  # its disk may be slow
# Those that wait to be connected when another has been given up need not find out for themselves.
_SILENT_S = 1.0
# Who waits for the turn of several others asks, before others would give up, whether the server is still there.
_TURN_S = 10
_PROBE_S = 2.0
# A controller whose event loop stands still for so long holds up the others no longer.
_IDLE_S = 4
_MIGRATE_S = 120
_POOL = 10
_POOL_S = 20.0  # that a reader waits behind others


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
    made = _engine(url, turn_s=_TURN_S, command_s=_COMMAND_S, isolation_level="AUTOCOMMIT")

    @event.listens_for(made.sync_engine, "checkout")
    def taken(connection: Any, _record: Any, _proxy: Any) -> None:
        # A server that was restarted costs a moment, and no call: the driver knows of it without asking.
        if connection.driver_connection.is_closed():
            raise exc.DisconnectionError

    return made


def migration_engine(url: URL) -> AsyncEngine:
    """For the migrations, which another controller may be at already."""
    return _engine(url, turn_s=_MIGRATE_S, command_s=_MIGRATE_S + 5.0)


def _engine(url: URL, *, turn_s: int, command_s: float, **options: Any) -> AsyncEngine:
    """`turn_s`: how long a writer waits for the others; `command_s`: and anybody for an answer."""
    silent_until = float("-inf")

    async def connect(*arguments: Any, **named: Any) -> Any:
        nonlocal silent_until
        if time.monotonic() < silent_until:
            raise TimeoutError("it does not answer")
        try:
            return await asyncpg.connect(*arguments, **named)
        except TimeoutError:
            silent_until = time.monotonic() + _SILENT_S
            raise

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
        pool_timeout=_POOL_S,
        connect_args={
            "async_creator_fn": connect,
            "timeout": _CONNECT_S,
            "command_timeout": command_s,
            "server_settings": settings,
        },
        **options,
    )


async def take_turn(connection: AsyncConnection) -> None:
    """From here to the end of the transaction no other controller writes."""
    await connection.execute(text(_TAKE_TURN))


# -- transactions ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def transaction(
    connection: AsyncConnection, *also: str, probe: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[str]:
    """All of the block or nothing of it. Gives what the server said to the last of the statements in `also`, which
    are sent together with the first. `probe`: they may have to wait for others, see `turn`."""
    driver = _driver(connection)
    begin = "; ".join((_BEGIN, *also))
    yield await (_tell(connection, begin) if probe is None else _tell_patiently(connection, begin, probe))
    if await _tell(connection, "COMMIT", _COMMIT_S) != "COMMIT":
        # The server takes back what has met an error, and says no more than that.
        raise InternalError(
            f"a transaction that had failed was to be committed (server process {driver.get_server_pid()})"
        )


@contextlib.asynccontextmanager
async def turn(
    connection: AsyncConnection, standing: Standing | None, *, lasts: bool, probe: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """A transaction in which no other controller writes. Raises Superseded where `standing` does not hold any more:
    that is looked at in a statement of its own after the turn was taken, which sees what was committed until then.
    `lasts`: it is on the server's disk when it is committed. `probe`: raises where the server does not answer, as who
    waits for others can't see it."""
    also = [_TAKE_TURN] if lasts else [_NEED_NOT_LAST, _TAKE_TURN]
    if standing is not None:
        name = standing.name.replace("'", "''")
        also.append(f"SELECT 1 FROM leases WHERE name = '{name}' AND fencing = {standing.number}")  # noqa: S608
    async with transaction(connection, *also, probe=probe) as told:
        if standing is not None and told != "SELECT 1":
            raise Superseded
        yield


async def begin_view(connection: AsyncConnection) -> None:
    """All statements see the same state, until the connection is given back."""
    await _tell(connection, _BEGIN_VIEW)


async def give_back(connection: AsyncConnection) -> None:
    """Whatever became of its transaction."""
    if is_under_way(connection):
        await _tell(connection, "ROLLBACK")
    await connection.close()


def is_under_way(connection: AsyncConnection) -> bool:
    """Whether a transaction of it is."""
    return not is_closed(connection) and bool(_driver(connection).is_in_transaction())


def is_closed(connection: AsyncConnection) -> bool:
    """Whether it is of no use any more; the driver knows without asking the server."""
    return connection.invalidated or bool(_driver(connection).is_closed())


def _driver(connection: AsyncConnection) -> Any:
    assert connection.sync_connection is not None
    return connection.sync_connection.connection.driver_connection


async def _tell(connection: AsyncConnection, statements: str, timeout_s: float = _COMMAND_S) -> str:
    """Past SQLAlchemy: what the server says to the last of them."""
    told: str = await tell(connection, _driver(connection).execute, statements, timeout=timeout_s)
    return told


async def _tell_patiently(connection: AsyncConnection, statements: str, probe: Callable[[], Awaitable[None]]) -> str:
    """As `_tell`, of what waits for other controllers. A server that stands still is given up as soon as elsewhere."""
    driver = _driver(connection)
    probing: list[asyncio.Future[None]] = []

    async def look() -> None:
        try:
            async with asyncio.timeout(_PROBE_S):
                await probe()
        except Exception as error:  # whatever it is, nobody is to wait longer
            log.info("the database does not answer", error=str(error))
            driver.terminate()

    later = asyncio.get_running_loop().call_later(
        _COMMAND_S - _PROBE_S, lambda: probing.append(asyncio.ensure_future(look()))
    )
    try:
        return await _tell(connection, statements, _TURN_S + _COMMAND_S)
    finally:
        later.cancel()
        for one in probing:
            one.cancel()


async def probe(connection: AsyncConnection) -> None:
    """Raises where the server does not answer."""
    await _tell(connection, "SELECT 1")


async def tell(connection: AsyncConnection, how: Callable[..., Awaitable[Any]], *what: Any, **more: Any) -> Any:
    """Past SQLAlchemy, by a method of the driver's: what the server says."""
    try:
        return await how(*what, **more)
    except asyncpg.PostgresError:
        raise  # it has answered; the transaction is ended when the connection is given back
    except asyncpg.InternalClientError as error:
        # What the driver says between the server's last word and the end of the connection.
        await connection.invalidate()
        raise ConnectionResetError("it has ended the connection") from error
    except BaseException:
        # The server may be at it still: nobody else is to have this connection. It is not bidden farewell, for which
        # SQLAlchemy would wait 2 s where the server stands still.
        _driver(connection).terminate()
        await connection.invalidate()
        raise
