"""SQLite as the controller's database: its connections, its transactions, errors in words.

Statements run in the event loop: each takes some 20 µs, for what a controller asks for is in the page cache, and to
hand it to a thread and back takes five times that (docs/decisions/0024-what-a-call-costs.md). What may wait for the
disk or for another process has a thread: opening and closing, becoming the writer where another process is it, and
committing what is to be on disk. Transactions are begun and ended past SQLAlchemy, whose share was most of their time.
"""

import asyncio
import contextlib
import sqlite3
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog
from sqlalchemy import create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool
from sqlalchemy.util.concurrency import await_, in_greenlet

from forkypig.controller.store import schema
from forkypig.errors import ForkyError, InternalError, NotPossibleNow, ResourceExhausted

log = structlog.get_logger()
T = TypeVar("T")

SKIP_EVENTS = "UPDATE sqlite_sequence SET seq = seq + :n WHERE name = 'events'"
_DRIVER = "forky"
# A transaction that begins as a reader can't always become a writer (SQLITE_BUSY_SNAPSHOT).
_BEGIN_WRITING = "BEGIN IMMEDIATE"
# Rows written by one statement that are left to a thread: a database of ten thousand machines is compared at a start.
_MANY = 100
# The log begins anew after so many pages, well within the room set aside. So many commits that are not synced write
# fewer: the one after them is handed to the thread, which writes the log back if it is long enough.
_LOG_PAGES = 128
_IN_LOOP = 16


class _Cursor(sqlite3.Cursor):
    """A cursor as SQLAlchemy's asyncio side expects it."""

    async def _async_soft_close(self) -> None:
        """Nothing to wait for: it is closed when its rows are read."""

    def executemany(self, sql: str, rows: Any) -> Self:
        if len(rows) < _MANY:
            return super().executemany(sql, rows)
        assert isinstance(self.connection, _Connection)
        return self.connection.in_thread(super().executemany, sql, rows)


class _Connection(sqlite3.Connection):
    """A connection that begins and ends transactions as said above, and is over once it is closed.

    Python closes with sqlite3_close_v2: while a cursor lives that has not been read to its end, SQLite keeps the
    connection as a "zombie", with its open transaction (https://www.sqlite.org/c3ref/close.html). A caller that is
    cancelled between a SELECT and its rows leaves such a cursor in its traceback, and the database stayed locked until
    that was forgotten.
    """

    def __init__(self, *args: Any, writer: ThreadPoolExecutor, **options: Any) -> None:
        """`writer`: one thread, so that what is asked of it is done in that order, also after a caller has left."""
        super().__init__(*args, **options)
        self._writer = writer
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        self._writes = False
        self._lasts = True
        self._closed = False
        self._in_loop = 0  # commits since the last in the thread
        self.busy_timeout_ms = 0

    def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        """For the asynchronous engine's calls: those are made in greenlets, which wait so."""
        return await_(asyncio.get_running_loop().run_in_executor(self._writer, call, *args))

    def cursor(self, factory: Any = _Cursor) -> Any:
        made = super().cursor(factory)
        self._cursors.add(made)
        return made

    async def begin_writing(self, *, lasts: bool) -> None:
        """`lasts`: what is written is on disk when it is committed."""
        self._writes = True
        lasts = lasts or self._in_loop >= _IN_LOOP
        if lasts is not self._lasts:
            # Of one that does not last the log is written, not synced; the next one that lasts syncs both.
            self._lasts = lasts
            self.execute(f"PRAGMA synchronous = {'FULL' if lasts else 'NORMAL'}")
            self.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES if lasts else 0}")
        if not self._begin_writing():
            await asyncio.get_running_loop().run_in_executor(self._writer, self.execute, _BEGIN_WRITING)

    def _begin_writing(self) -> bool:
        """Whether no other process is writing: within this one writers take turns."""
        self.execute("PRAGMA busy_timeout = 0")
        try:
            self.execute(_BEGIN_WRITING)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY":
                raise
            return False
        finally:
            self.execute(f"PRAGMA busy_timeout = {self.busy_timeout_ms}")
        return True

    async def end_writing(self) -> None:
        """Commits."""
        if self._lasts:
            await asyncio.get_running_loop().run_in_executor(self._writer, self.commit)
            self._in_loop = 0
        else:
            self.commit()
            self._in_loop += 1
        self._writes = False

    def rollback(self) -> None:
        if self._writes:  # behind a commit that a caller did not wait for
            self.in_thread(super().rollback)
        else:
            super().rollback()
        self._writes = False

    def close(self) -> None:
        if self._closed:  # the driver closes twice
            return
        self._closed = True
        for cursor in list(self._cursors):
            cursor.close()
        if in_greenlet():
            self.in_thread(self._end)
        else:
            self._end()

    def _end(self) -> None:
        if self.in_transaction:
            super().rollback()
        super().close()


class _Nothing:
    """To be awaited without waiting: SQLAlchemy takes a driver that never awaits for one that blocks by mistake."""

    def __await__(self) -> Generator[Any, Any, None]:
        return
        yield


class _Dialect(SQLiteDialect_pysqlite):
    """Python's own SQLite below SQLAlchemy's asyncio side."""

    driver = _DRIVER
    is_async = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool

    def connect(self, *args: Any, **options: Any) -> Any:
        busy_timeout_s: float = options.pop("busy_timeout_s")

        def connected() -> _Connection:
            connection = sqlite3.connect(*args, factory=_Connection, **options)
            try:
                configure(connection, busy_timeout_s)
            except BaseException:
                connection.close()
                raise
            return connection

        return await_(asyncio.to_thread(connected))  # not the writer's thread, which may wait for another process

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        cursor.execute(statement, parameters)
        await_(_NOTHING)

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        cursor.executemany(statement, parameters)
        await_(_NOTHING)


_NOTHING = _Nothing()
registry.register(f"sqlite.{_DRIVER}", __name__, _Dialect.__name__)


def engine(path: Path, writer: ThreadPoolExecutor, busy_timeout_s: float) -> AsyncEngine:
    """Connections; none is made yet. `writer`: one thread; `busy_timeout_s`: how long to wait for other processes."""
    return create_async_engine(
        URL.create(f"sqlite+{_DRIVER}", database=str(path)),
        pool_size=4,
        isolation_level="AUTOCOMMIT",
        connect_args={"writer": writer, "busy_timeout_s": busy_timeout_s},
    )


def begin_view(connection: AsyncConnection) -> None:
    """All statements see the same state, until the connection is given back."""
    _driver(connection).execute("BEGIN")


@contextlib.asynccontextmanager
async def transaction(connection: AsyncConnection, *, lasts: bool) -> AsyncIterator[None]:
    """All of the block or nothing of it; what is left of one that failed ends as the connection is given back."""
    driver = _driver(connection)
    await driver.begin_writing(lasts=lasts)
    yield
    await driver.end_writing()


def _driver(connection: AsyncConnection) -> _Connection:
    assert connection.sync_connection is not None
    driver = connection.sync_connection.connection.driver_connection
    assert isinstance(driver, _Connection)
    return driver


def configure(connection: sqlite3.Connection, busy_timeout_s: float) -> None:
    # The driver's own idea of when to begin a transaction leaves out reads and schema changes.
    connection.isolation_level = None
    milliseconds = int(busy_timeout_s * 1000)
    if isinstance(connection, _Connection):
        connection.busy_timeout_ms = milliseconds
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {milliseconds}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # What is answered is on disk, also in a power cut: 0.2 ms a transaction (NORMAL syncs at checkpoints alone).
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
    cursor.close()


def migrate(path: Path, busy_timeout_s: float) -> None:
    """Makes the database, or brings its schema up to date. Blocks: for a thread."""
    made = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": busy_timeout_s})

    @event.listens_for(made, "connect")
    def connected(connection: Any, _record: Any) -> None:
        configure(connection, busy_timeout_s)
        # A table is changed by making it anew, which would remove the rows that refer to its rows.
        # (https://www.sqlite.org/lang_altertable.html, "Making Other Kinds Of Table Schema Changes".)
        connection.execute("PRAGMA foreign_keys = OFF")

    @event.listens_for(made, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(_BEGIN_WRITING)

    try:
        with made.begin() as connection:
            schema.upgrade(connection)
    finally:
        made.dispose()
    path.chmod(0o600)


def check(path: Path) -> str:
    """What is wrong with the database's pages; empty when nothing is. Blocks: for a thread."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        rows: Sequence[tuple[str]] = connection.execute("PRAGMA quick_check(1)").fetchall()
    return "" if rows == [("ok",)] else str(rows[0][0])


def in_words(path: Path, error: Exception) -> ForkyError:
    """The error as ours."""
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
