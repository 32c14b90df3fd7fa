"""The database: opening it, transactions, and errors in words.

Writers take turns at a lock of ours, so that they never meet SQLite's; a reader sees the state before or after a
whole transaction. Another process that holds the database (a backup) is waited for, then named. Room is set aside in
the database's own files, so that on a full disk machines are still shown as they are and can be removed.

SQLite's part is in sqlite.py; PostgreSQL's, which several controllers may share, in postgres.py.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import structlog
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from forkypig.controller.store import postgres, postgres_errors, schema, sqlite
from forkypig.controller.store.standing import Standing
from forkypig.errors import ForkyError

log = structlog.get_logger()

_OWNER = "forky_owner"  # of the intents that a transaction writes down
_ROOM_BYTES = 1 << 20
# A power cut takes with it what need not last, an event of it among that, whose number somebody may have seen. SQLite
# syncs its log every 128 pages, so they were fewer than so many.
_SKIPPED = 1000
# A controller that ended a moment ago may still be writing its log back, and its disk may be slow to sync.
_PREDECESSOR_S = 20.0


def owner_of(connection: AsyncConnection) -> int | None:
    """The fencing number of the controller that a transaction of `Store.write` is of, where several share one."""
    assert connection.sync_connection is not None
    owner: int | None = connection.sync_connection.info.get(_OWNER)
    return owner


class Store:
    """The controller's database."""

    def __init__(self, where: Path | str, engine: AsyncEngine, writer: ThreadPoolExecutor | None = None) -> None:
        """`where`: SQLite's file, or PostgreSQL's address as it may be shown; `writer`: SQLite's thread."""
        self.where = where
        self.is_shared = isinstance(where, str)  # other controllers may work on it too
        self._engine, self._writer = engine, writer
        self._turn = asyncio.Lock()
        self._closing: set[asyncio.Future[None]] = set()
        self._written = asyncio.Event()
        self._kept: AsyncConnection | None = None  # that of the last who wrote, for the next
        self.standing: Standing | None = None  # in whose name this one writes, where the database is shared

    @classmethod
    async def open(cls, at: Path | str, *, busy_timeout_s: float = 5.0) -> "Store":
        """Opens or makes the database, SQLite's file or PostgreSQL by its URL, and migrates it.

        Raises InvalidRequest, NotPossibleNow, ResourceExhausted, HostUnreachable or InternalError."""
        if isinstance(at, str):
            return await cls._open_postgres(at)
        with _errors(at):
            await asyncio.to_thread(sqlite.migrate, at, max(busy_timeout_s, _PREDECESSOR_S))
        writer = ThreadPoolExecutor(1, "database")
        store = cls(at, sqlite.engine(at, writer, busy_timeout_s), writer)
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
                    await connection.run_sync(schema.upgrade)
        finally:
            await migrating.dispose()
        return cls(where, postgres.engine(url))

    async def close(self) -> None:
        if self._kept is not None:
            self._give_back(self._kept)
        if self._closing:
            await asyncio.wait(self._closing)
        await self._engine.dispose()
        if self._writer is not None:
            self._writer.shutdown(wait=False)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """A connection, which is given back whatever happens: a caller that is cancelled twice would interrupt the
        rollback, and what it had begun to write would lock the database for ever."""
        connection = await self._engine.connect()
        try:
            yield connection
        except BaseException:
            await asyncio.shield(self._give_back(connection))
            raise
        if self.is_shared and postgres.is_under_way(connection):
            self._give_back(connection)  # a view: its end tells nothing, and nobody waits for it
        else:
            await connection.close()  # waits for nobody

    def _give_back(self, connection: AsyncConnection) -> asyncio.Future[None]:
        closing = asyncio.ensure_future(postgres.give_back(connection) if self.is_shared else connection.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closed)
        return closing

    def _closed(self, closing: asyncio.Future[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (error := closing.exception()) is not None:
            log.info("a connection to the database ended with an error", error=str(error))

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A consistent view."""
        with _errors(self.where):
            async with self._connected() as connection:
                if self.is_shared:
                    await postgres.begin_view(connection)
                else:
                    sqlite.begin_view(connection)
                yield connection

    @contextlib.asynccontextmanager
    async def glance(self) -> AsyncIterator[AsyncConnection]:
        """For one statement, or several that need not see the same state: each sees what is committed by then. With
        PostgreSQL two round trips less than `read`."""
        with _errors(self.where):
            async with self._connected() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def write(self, *, lasts: bool = True) -> AsyncIterator[AsyncConnection]:
        """A transaction: all of the block or nothing of it. Blocks are short and wait for nobody else.

        `lasts`: when the block ends it is on disk. What a power cut makes untrue anyway need not be: any other process
        sees it at once, it outlives this one, and what is written later and lasts has it last too.
        Raises Superseded where other controllers have taken this one's operations over."""
        with _errors(self.where):
            async with (
                self._turn,
                self._for_writing() as connection,
                postgres.turn(connection, self.standing, lasts=lasts, probe=self._probe)
                if self.is_shared
                else sqlite.transaction(connection, lasts=lasts),
            ):
                yield connection
        written, self._written = self._written, asyncio.Event()
        written.set()

    @contextlib.asynccontextmanager
    async def _for_writing(self) -> AsyncIterator[AsyncConnection]:
        """The connection of the last who wrote, unless it failed them: to take one and give it back is a fifth of what
        a short transaction takes."""
        connection, self._kept = self._kept, None
        if connection is not None and self.is_shared and postgres.is_closed(connection):
            self._give_back(connection)
            connection = None
        if connection is None:
            connection = await self._engine.connect()
        try:
            assert connection.sync_connection is not None
            connection.sync_connection.info[_OWNER] = self.standing.number if self.standing else None
            yield connection
        except BaseException:
            await asyncio.shield(self._give_back(connection))
            raise
        self._kept = connection

    def next_write(self) -> asyncio.Event:
        """Set when a transaction is committed after this call, by this process. Others' are not noticed."""
        return self._written

    @contextlib.asynccontextmanager
    async def beat(self) -> AsyncIterator[AsyncConnection]:
        """A transaction on the rows of leases alone, which waits for nobody's turn; where the database is shared."""
        with _errors(self.where):
            async with self._connected() as connection, postgres.transaction(connection):
                yield connection

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
                await connection.execute(text(sqlite.SKIP_EVENTS), {"n": _SKIPPED})
        except ForkyError as error:
            log.warning("no room set aside for a full disk", error=str(error))

    async def check(self) -> str:
        """What is wrong with the database's pages; empty when nothing is."""
        with _errors(self.where):
            if isinstance(self.where, Path):
                return await asyncio.to_thread(sqlite.check, self.where)
            await self._probe()
        return ""

    async def _probe(self) -> None:
        async with self._connected() as connection:
            await postgres.probe(connection)


@contextlib.contextmanager
def _errors(where: Path | str) -> Iterator[None]:
    """Turns the database's errors into ours."""
    try:
        yield
    except exc.IntegrityError:
        raise  # a name that is taken: the caller knows which
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise (
            sqlite.in_words(where, error) if isinstance(where, Path) else postgres_errors.in_words(where, error)
        ) from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if isinstance(where, Path):
            raise
        raise postgres_errors.in_words(where, error) from error  # what SQLAlchemy hands on, or never saw
