"""The database's engines: one PostgreSQL server for all tests, started by the first that needs it."""

from collections.abc import Iterator

import pytest

from tests.component.postgres_rig import Postgres, postgres


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with postgres() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each engine; "": SQLite, in the home."""
    if request.param == "sqlite":
        return ""
    made: Postgres = request.getfixturevalue("server")
    return made.url(made.new_database())
