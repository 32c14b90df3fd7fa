"""What tests of more than one file stand on."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from forkypig.controller import store
from forkypig.daemon.settings import Settings
from forkypig.net.fabric import Fabric
from tests.archive_rig import Home, add_image, new_home
from tests.component.controller_rig import Client, home, running_host, serving
from tests.component.fake_host import FakeHost
from tests.component.net_rig import World, make_world
from tests.component.postgres_rig import Postgres, postgres

_EMPTY = """DO $$ DECLARE list text; BEGIN
  SELECT string_agg(tablename, ',') INTO list FROM pg_tables
    WHERE schemaname = 'public' AND tablename NOT IN ('alembic_version', 'tenants');
  IF list IS NOT NULL THEN EXECUTE 'TRUNCATE ' || list || ' RESTART IDENTITY'; END IF;
  IF to_regclass('tenants') IS NOT NULL THEN DELETE FROM tenants WHERE name != 'default'; END IF;
END $$"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Network namespaces of the test's own, of which nothing may be left."""
    with make_world(tmp_path) as made:
        yield made
        assert made.leftovers() == []


@pytest.fixture
async def fabric(world: World) -> AsyncIterator[Fabric]:
    """The network of one host in it."""
    made = Fabric(world.config(), ready=0)
    await made.open()
    try:
        yield made
    finally:
        await made.close(remove=True)


@pytest.fixture
def here(tmp_path: Path) -> Home:
    """A home with a store and an image."""
    home = new_home(tmp_path / "here")
    add_image(home)
    return home


@pytest.fixture
def there(tmp_path: Path) -> Home:
    """An empty one."""
    return new_home(tmp_path / "there")


@pytest.fixture
def settings() -> Iterator[Settings]:
    """Of an instance of its own, on SQLite."""
    with home() as made:
        yield made


@pytest.fixture
async def host(settings: Settings) -> AsyncIterator[FakeHost]:
    """Its hostd."""
    async with running_host(settings) as fake:
        yield fake


@pytest.fixture
async def client(settings: Settings, host: FakeHost) -> AsyncIterator[Client]:
    """The operator's, in the default tenant, and its controller."""
    async with serving(settings) as made:
        yield made


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with postgres() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each engine; "": SQLite, in the home."""
    return "" if request.param == "sqlite" else request.getfixturevalue("emptied")


@pytest.fixture
def emptied(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """PostgreSQL's address. One database for all tests, since making one takes longer than a test."""
    monkeypatch.setattr(store.postgres, "_IDLE_S", 60)  # the controller's process may stand still in a transaction
    server.sql(_EMPTY)
    return server.url("postgres")


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory in which names are taken that a file may be copied to (a file, a link to one, one that has two
    names, a pipe), and an end of that pipe."""
    into = tmp_path / "into"
    into.mkdir()
    for name in ("file", "linked", "two"):
        (into / name).write_bytes(b"older, and longer")
    (into / "link").symlink_to("linked")
    (into / "names").hardlink_to(into / "two")
    os.mkfifo(into / "pipe", 0o600)
    pipe = os.open(into / "pipe", os.O_RDWR)
    yield into, pipe
    os.close(pipe)
