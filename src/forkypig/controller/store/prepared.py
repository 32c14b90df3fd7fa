"""Statements that every call runs: put into words once, and given to the driver past SQLAlchemy.

To run a statement that is ready takes SQLAlchemy 80 µs of CPU, and the driver 20 (docs/decisions/0024-what-a-call-
costs.md). Parameters and columns are text, numbers and bytes, which need no conversion. Several that write can be told
to PostgreSQL in one message (`run_all`).
"""

import re
import sqlite3
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy import exc
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.expression import Select, UpdateBase

from forkypig.controller.store import postgres

_PLACE = re.compile(r"\$(\d+)")


@dataclass(frozen=True, slots=True)
class _Words:
    """A statement as one engine's driver takes it."""

    sql: str
    names: Sequence[str]  # of the parameters, in order
    fixed: dict[str, Any]  # those that are part of the statement


class Prepared:
    """A statement of SQLAlchemy's; its parameters are `bindparam`s, none of them a list."""

    def __init__(self, statement: Select[Any] | UpdateBase) -> None:
        self._statement = statement
        self._words: dict[str, _Words] = {}
        self.row: Callable[[Iterable[Any]], Any] = _named([str(column.key) for column in statement.exported_columns])

    def words(self, dialect: Dialect) -> _Words:
        """For one engine."""
        if (known := self._words.get(dialect.name)) is None:
            made: Any = self._statement.compile(dialect=dialect)
            known = self._words[dialect.name] = _Words(str(made), tuple(made.positiontup), dict(made.params))
        return known

    async def run(self, connection: AsyncConnection, **values: Any) -> list[Any]:
        """Its rows, by the names of their columns. Raises sqlalchemy.exc.IntegrityError."""
        return await Write(self, values).run(connection)


def _named(columns: Sequence[str]) -> Callable[[Iterable[Any]], Any]:
    """Rows by the names of their columns."""
    row: Any = namedtuple("Row", columns)  # type: ignore[misc]
    make: Callable[[Iterable[Any]], Any] = row._make
    return make


@dataclass(frozen=True, slots=True)
class Write:
    """A statement that is going to be run."""

    statement: Prepared
    values: dict[str, Any]

    async def run(self, connection: AsyncConnection) -> list[Any]:
        """As `Prepared.run`."""
        words, arguments = self.told(connection.dialect)
        return [self.statement.row(row) for row in await _tell(connection, words.sql, arguments)]

    def told(self, dialect: Dialect) -> tuple[_Words, list[Any]]:
        """In words, and the parameters in order."""
        words = self.statement.words(dialect)
        values = words.fixed | self.values
        return words, [values[name] for name in words.names]


async def run_all(connection: AsyncConnection, writes: Sequence[Write]) -> list[Any]:
    """Runs several, of which none sees what another has written; the rows of the last. With PostgreSQL it is one
    statement: all but the last are its common table expressions."""
    if len(writes) == 1 or connection.dialect.name == "sqlite":
        rows: list[Any] = []
        for write in writes:
            rows = await write.run(connection)
        return rows
    parts: list[str] = []
    arguments: list[Any] = []
    for write in writes:
        words, more = write.told(connection.dialect)
        parts.append(_renumbered(words.sql, len(arguments)))
        arguments += more
    *first, last = parts
    common = ", ".join(f"w{number} AS ({part})" for number, part in enumerate(first))
    return [writes[-1].statement.row(row) for row in await _tell(connection, f"WITH {common} {last}", arguments)]


def _renumbered(sql: str, before: int) -> str:
    """With `before` parameters before its own."""
    return _PLACE.sub(lambda found: f"${before + int(found[1])}", sql)


async def _tell(connection: AsyncConnection, sql: str, arguments: Sequence[Any]) -> list[Any]:
    assert connection.sync_connection is not None
    driver: Any = connection.sync_connection.connection.driver_connection
    try:
        if isinstance(driver, sqlite3.Connection):
            return driver.execute(sql, arguments).fetchall()
        rows: list[Any] = await postgres.tell(connection, driver.fetch, sql, *arguments)
    except (sqlite3.IntegrityError, asyncpg.IntegrityConstraintViolationError) as error:
        raise exc.IntegrityError(sql, None, error) from error
    return rows
