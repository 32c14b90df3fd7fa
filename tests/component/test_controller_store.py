"""The database itself."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from forkypig.controller.store.engine import Store


async def test_room_for_a_full_disk_is_set_aside_once(tmp_path: Path) -> None:
    path = tmp_path / "controller.db"
    sizes = []
    for _ in range(3):
        store = await Store.open(path)
        log_bytes = path.with_name("controller.db-wal").stat().st_size
        await store.close()
        with sqlite3.connect(path) as connection:
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        assert log_bytes >= 1 << 20
        assert free * page_bytes >= 1 << 20
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] == sizes[2]


async def test_an_interrupted_transaction_leaves_no_lock(tmp_path: Path) -> None:
    """A caller that is cancelled between a SELECT and its rows: SQLAlchemy gives the connection up, its traceback holds
    the cursor."""
    path = tmp_path / "controller.db"
    store = await Store.open(path)
    async with store.write() as connection:
        await connection.execute(text("CREATE TABLE things AS SELECT 1 AS thing UNION SELECT 2"))
    with pytest.raises(ZeroDivisionError):
        async with store.write() as connection:
            await connection.execute(text("INSERT INTO things VALUES (3)"))
            driver: Any = (await connection.get_raw_connection()).driver_connection
            cursor = await driver.execute("SELECT thing FROM things")
            await connection.invalidate()
            raise ZeroDivisionError
    await store.close()
    with sqlite3.connect(path, isolation_level=None, timeout=0) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM things").fetchone() == (2,)
        other.execute("ROLLBACK")
    assert cursor.description
