"""The database itself."""

import sqlite3
from pathlib import Path

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
