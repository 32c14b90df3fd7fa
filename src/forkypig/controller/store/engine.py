"""The database: opening it, bringing its schema up to date, transactions, and errors in words.

Writers take turns at a lock of ours, so that they never meet SQLite's; a reader sees the state before or after a
whole transaction. Another process that holds the database (a backup) is waited for, then named. Room is set aside in
the database's own files, so that on a full disk machines are still shown as they are and can be removed.

SQLite's part is here; what is different on PostgreSQL, which several controllers may share, is in postgres.py.
"""

import asyncio
import contextlib
import sqlite3
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import bindparam, create_engine, event, exc, select, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from forkypig.controller.store import postgres
from forkypig.controller.store.tables import leases
from forkypig.errors import ForkyError, InternalError, NotPossibleNow, ResourceExhausted

log = structlog.get_logger()

_MIGRATIONS = Path(__file__).parent.parent / "migrations"
_WRITES = "forky_writes"
_OWNER = "forky_owner"  # of the intents that a transaction writes down
_FENCING = select(leases.c.fencing).where(leases.c.name == bindparam("wanted"))
_ROOM_BYTES = 1 << 20
# A controller that ended a moment ago may still be writing its log back, and its disk may be slow to sync.
_PREDECESSOR_S = 20.0


def owner_of(connection: AsyncConnection) -> int | None:
    """The fencing number of the controller that a transaction of `Store.write` is of, where several share one."""
    assert connection.sync_connection is not None
    owner: int | None = connection.sync_connection.get_execution_options().get(_OWNER)
    return owner


class Superseded(NotPossibleNow):
    """Other controllers took this one for dead, and its operations over."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A controller among those that share a database: under which name, and since which fencing number."""

    name: str
    number: int


class Store:
    """The controller's database."""

    def __init__(self, where: Path | str, engine: AsyncEngine) -> None:
        """`where`: SQLite's file, or PostgreSQL's address as it may be shown."""
        self.where = where
        self.is_shared = isinstance(where, str)  # other controllers may work on it too
        self.standing: Standing | None = None  # where it is shared: in whose name this one writes
        self._engine = engine
        self._reading = engine
        if self.is_shared:
            self._reading = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._turn = asyncio.Lock()
        self._closing: set[asyncio.Future[None]] = set()
        self._written = asyncio.Event()

    @classmethod
    async def open(cls, at: Path | str, *, busy_timeout_s: float = 5.0) -> "Store":
        """Opens or makes the database, SQLite's file or PostgreSQL by its URL, and migrates it.

        Raises InvalidRequest, NotPossibleNow, ResourceExhausted, HostUnreachable or InternalError."""
        if isinstance(at, str):
            return await cls._open_postgres(at)
        path = at
        with _errors(path):
            await asyncio.to_thread(_migrate, path, max(busy_timeout_s, _PREDECESSOR_S))
            url = URL.create("sqlite+aiosqlite", database=str(path))
            engine = create_async_engine(url, pool_size=4, connect_args={"factory": _Connection})
            _tune(engine, busy_timeout_s)
        store = cls(path, engine)
        await store._set_room_aside()
        return store

    @classmethod
    async def _open_postgres(cls, at: str) -> "Store":
        url = postgres.address(at)
        where = postgres.shown(url)
        migrating = postgres.migration_engine(url)
        try:
            with _errors(where):
                async with migrating.begin() as connection:
                    await postgres.take_turn(connection)  # controllers that start at once migrate one after another
                    await connection.run_sync(_upgrade)
        finally:
            await migrating.dispose()
        return cls(where, postgres.engine(url))

    async def close(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def _connected(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """A connection, which is given back whatever happens: a caller that is cancelled twice would interrupt the
        rollback, and what it had begun to write would lock the database for ever."""
        connection = await engine.connect()
        try:
            yield connection
        finally:
            closing = asyncio.ensure_future(connection.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A consistent view."""
        with _errors(self.where):
            async with self._connected(self._reading) as connection, connection.begin():
                yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: all of the block or nothing of it. Blocks are short and wait for nobody else.

        Raises Superseded where other controllers have taken this one's operations over."""
        with _errors(self.where):
            async with self._turn, self._connected(self._engine) as plain:
                owner = self.standing.number if self.standing else None
                connection = await plain.execution_options(**{_WRITES: True, _OWNER: owner})
                async with connection.begin():
                    if self.is_shared:
                        await postgres.take_turn(connection)
                        await self._check_standing(connection)
                    yield connection
        written, self._written = self._written, asyncio.Event()
        written.set()

    def next_write(self) -> asyncio.Event:
        """Set when a transaction is committed after this call, by this process. Others' are not noticed."""
        return self._written

    @contextlib.asynccontextmanager
    async def beat(self) -> AsyncIterator[AsyncConnection]:
        """A transaction on the rows of leases alone, which waits for nobody's turn."""
        with _errors(self.where):
            async with self._connected(self._engine) as connection, connection.begin():
                yield connection

    async def _check_standing(self, connection: AsyncConnection) -> None:
        """In a statement of its own after the turn was taken: it sees what was committed until then."""
        if (mine := self.standing) is None:
            return
        number = await connection.scalar(_FENCING, {"wanted": mine.name})
        if number != mine.number:
            raise Superseded(
                "this controller stood still for too long, and another has finished or undone its operations: see "
                "what became of them (forky ps), then try again"
            )

    async def _set_room_aside(self) -> None:
        """Grows the log and the file once: SQLite writes over a log and takes free pages before it asks for new ones.

        (https://www.sqlite.org/wal.html, "Avoiding Excessively Large WAL Files"; fileformat2.html, "The Freelist".)
        """
        try:
            async with self.write() as connection:
                await connection.execute(text("CREATE TABLE room_set_aside (room BLOB)"))
                await connection.execute(text("INSERT INTO room_set_aside VALUES (zeroblob(:n))"), {"n": _ROOM_BYTES})
            # Longer than wal_autocheckpoint: it is in the file by now.
            async with self.write() as connection:
                await connection.execute(text("DROP TABLE room_set_aside"))
        except ForkyError as error:
            log.warning("no room set aside for a full disk", error=str(error))

    async def check(self) -> str:
        """What is wrong with the database's pages; empty when nothing is."""
        async with self.read() as connection:
            if connection.dialect.name != "sqlite":
                return ""
            answer = (await connection.execute(text("PRAGMA quick_check(1)"))).scalar_one()
        return "" if answer == "ok" else str(answer)


class _Connection(sqlite3.Connection):
    """A connection that is over once it is closed.

    Python closes with sqlite3_close_v2: while a cursor lives that has not been read to its end, SQLite keeps the
    connection as a "zombie", with its open transaction (https://www.sqlite.org/c3ref/close.html). A caller that is
    cancelled between a SELECT and its rows leaves such a cursor in its traceback, and the database stayed locked until
    that was forgotten.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        self._closed = False

    def cursor(self, *args: Any, **options: Any) -> Any:
        made = super().cursor(*args, **options)
        self._cursors.add(made)
        return made

    def close(self) -> None:
        if self._closed:  # the driver closes twice
            return
        self._closed = True
        for cursor in list(self._cursors):
            cursor.close()
        if self.in_transaction:
            self.rollback()
        super().close()


def _tune(engine: AsyncEngine, busy_timeout_s: float) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        _configure(connection, busy_timeout_s)

    @event.listens_for(engine.sync_engine, "begin")
    def begun(connection: Connection) -> None:
        # A transaction that begins as a reader can't always become a writer (SQLITE_BUSY_SNAPSHOT).
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure(connection: Any, busy_timeout_s: float) -> None:
    # The driver's own idea of when to begin a transaction leaves out reads and schema changes.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # What is answered is on disk, also in a power cut: 0.2 ms a transaction (NORMAL syncs at checkpoints alone).
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA wal_autocheckpoint = 128")  # pages: the log begins anew well within the room set aside
    cursor.close()


def _migrate(path: Path, busy_timeout_s: float) -> None:
    """Brings the schema up to date. Blocks: for a thread."""
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": busy_timeout_s})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        _configure(connection, busy_timeout_s)
        # A table is changed by making it anew, which would remove the rows that refer to its rows.
        # (https://www.sqlite.org/lang_altertable.html, "Making Other Kinds Of Table Schema Changes".)
        connection.execute("PRAGMA foreign_keys = OFF")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            _upgrade(connection)
    finally:
        engine.dispose()
    path.chmod(0o600)


def _upgrade(connection: Connection, revision: str = "head") -> None:
    """Runs the migrations on a connection, in its transaction."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        raise NotPossibleNow(
            f"the controller's database was written by another version of Forky Pig ({error}): install that one, or "
            "put a backup in its place"
        ) from error


@contextlib.contextmanager
def _errors(where: Path | str) -> Iterator[None]:
    """Turns the database's errors into ours."""
    try:
        yield
    except exc.IntegrityError:
        raise  # a name that is taken: the caller knows which
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise (_in_words(where, error) if isinstance(where, Path) else postgres.in_words(where, error)) from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if isinstance(where, Path):
            raise
        raise postgres.in_words(where, error) from error  # before there is a connection, SQLAlchemy hands on all


def _in_words(path: Path, error: Exception) -> ForkyError:
    cause: Any = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return NotPossibleNow(
            f"the controller's database {path} is locked by another process: let that end, then try again"
        )
    if name.startswith("SQLITE_FULL"):
        return ResourceExhausted(f"the disk is full: {path} can't be written; free space there and try again")
    if name.startswith(("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
        return ResourceExhausted(f"{path} can't be written ({cause}): check the disk and the file's permissions")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return InternalError(f"{path} is damaged ({cause}): put a backup in its place, or move it away to start anew")
    log.error("database error", path=str(path), exc_info=error)
    return InternalError(f"the controller's database {path} failed: {cause}")
