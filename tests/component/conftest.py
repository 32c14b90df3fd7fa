"""The database's engines: one PostgreSQL server for all tests, started by the first that needs it."""

from collections.abc import Iterator

import pytest

from tests.component.postgres_rig import Postgres, postgres

_EMPTY = """DO $$ DECLARE list text; BEGIN
  SELECT string_agg(tablename, ',') INTO list FROM pg_tables
    WHERE schemaname = 'public' AND tablename != 'alembic_version';
  IF list IS NOT NULL THEN EXECUTE 'TRUNCATE ' || list || ' RESTART IDENTITY'; END IF;
END $$"""


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with postgres() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each engine; "": SQLite, in the home."""
    return "" if request.param == "sqlite" else request.getfixturevalue("emptied")


@pytest.fixture
def emptied(server: Postgres) -> str:
    """PostgreSQL's address. One database for all tests, since making one takes longer than a test."""
    server.sql(_EMPTY)
    return server.url("postgres")
