"""The database: opening it, bringing its schema up to date, transactions, and errors in words.

Writers take turns at a lock of ours, so that they never meet SQLite's; a reader sees the state before or after a
whole transaction. Another process that holds the database (a backup) is waited for, then named. Room is set aside in
the database's own files, so that on a full disk machines are still shown as they are and can be removed.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from forkypig.errors import ForkyError, InternalError, NotPossibleNow, ResourceExhausted

log = structlog.get_logger()

_MIGRATIONS = Path(__file__).parent.parent / "migrations"
_WRITES = "forky_writes"
_ROOM_BYTES = 1 << 20
# A controller that ended a moment ago may still be writing its log back, and its disk may be slow to sync.
_PREDECESSOR_S = 20.0


class Store:
    """The controller's database."""

    def __init__(self, path: Path, engine: AsyncEngine) -> None:
        self.path = path
        self._engine = engine
        self._turn = asyncio.Lock()
        self._closing: set[asyncio.Future[None]] = set()
        self._written = asyncio.Event()

    @classmethod
    async def open(cls, path: Path, *, busy_timeout_s: float = 5.0) -> "Store":
        """Opens or makes the database and migrates it. Raises NotPossibleNow, ResourceExhausted or InternalError."""
        with _errors(path):
            await asyncio.to_thread(_migrate, path, max(busy_timeout_s, _PREDECESSOR_S))
            engine = create_async_engine(URL.create("sqlite+aiosqlite", database=str(path)), pool_size=4)
            _tune(engine, busy_timeout_s)
        store = cls(path, engine)
        await store._set_room_aside()
        return store

    async def close(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """A connection, which is given back whatever happens: a caller that is cancelled twice would interrupt the
        rollback, and what it had begun to write would lock the database for ever."""
        connection = await self._engine.connect()
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
        with _errors(self.path):
            async with self._connected() as connection, connection.begin():
                yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: all of the block or nothing of it. Blocks are short and wait for nobody else."""
        with _errors(self.path):
            async with self._turn, self._connected() as plain:
                connection = await plain.execution_options(**{_WRITES: True})
                async with connection.begin():
                    yield connection
        written, self._written = self._written, asyncio.Event()
        written.set()

    def next_write(self) -> asyncio.Event:
        """Set when a transaction is committed after this call, by this process. Others' are not noticed."""
        return self._written

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
    cursor.execute("PRAGMA synchronous = NORMAL")  # in WAL a crash of ours loses nothing, a power cut the last moments
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA wal_autocheckpoint = 128")  # pages: the log begins anew well within the room set aside
    cursor.close()


def _migrate(path: Path, busy_timeout_s: float) -> None:
    """Brings the schema up to date. Blocks: for a thread."""
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": busy_timeout_s})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        _configure(connection, busy_timeout_s)

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()
    path.chmod(0o600)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns the database's errors into ours."""
    try:
        yield
    except exc.IntegrityError:
        raise  # a name that is taken: the caller knows which
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise _in_words(path, error) from error


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
