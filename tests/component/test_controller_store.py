"""The database itself, on both engines.

More than 500 lines: a test for each thing it promises, on the fixtures of this file."""

import asyncio
import contextlib
import os
import secrets
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from forkypig import errors
from forkypig.controller.store import (
    Store,
    events,
    images,
    intents,
    leases,
    machines,
    postgres,
    schema,
    snapshots,
    usage,
)
from forkypig.controller.store.standing import Standing, Superseded
from forkypig.core.intents import IntentKind, IntentStatus
from forkypig.daemon.server import now_us
from forkypig.model import Image, ImageId, Machine, MachineId, MachineState, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.model.access import DEFAULT_TENANT
from forkypig.model.tenants import Usage
from tests.component import postgres_rig
from tests.component.postgres_rig import Postgres

SHAPE = Shape(1, 512, 2048)
IMAGE = Image(
    id=ImageId("i-00000000000a"),
    name="debian-12",
    size_bytes=1 << 40,
    kernel="6.1",
    sha256="ab" * 32,
    created_us=1,
    description="«ä»",
    forget_files=("/etc/token",),
)


def machine(number: int, name: str = "", **fields: object) -> Machine:
    made = Machine(
        id=MachineId(f"m-{number:012x}"),
        name=name or f"m{number}",
        state=MachineState.RUNNING,
        image=IMAGE.id,
        image_name="debian-12",
        shape=SHAPE,
        created_us=number,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def snapshot(number: int, **fields: object) -> Snapshot:
    made = Snapshot(
        id=SnapshotId(f"s-{number:012x}"),
        kind=SnapshotKind.FORK,
        parent=None,
        machine=None,
        image=IMAGE.id,
        shape=SHAPE,
        machine_type="pc-q35-7.2",
        qemu_build="7.2",
        accelerator="tcg",
        cpu_model="max",
        pause_ms=12.5,
        own_memory_bytes=1 << 40,
        created_us=number,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


@pytest.fixture
def at(database_url: str, tmp_path: Path) -> Path | str:
    return database_url or tmp_path / "controller.db"


@pytest_asyncio.fixture
async def store(at: Path | str) -> AsyncIterator[Store]:
    made = await Store.open(at)
    try:
        yield made
    finally:
        await made.close()


async def test_what_is_written_is_read(store: Store) -> None:
    big = machine(1, failure="«…» " * 1000, qemu_pid=1 << 30)
    kept = snapshot(2, tag="base", kind=SnapshotKind.KEPT, parent=SnapshotId("s-000000000001"))
    async with store.write() as tx:
        await images.replace_all(tx, [IMAGE])
        await snapshots.save(tx, [snapshot(1), kept])
        await snapshots.set_template(tx, snapshot(1))
        await machines.add(tx, [big])
        await events.add(tx, "machine.created", big.id, "«ä»")
        intent = await intents.add(
            tx, IntentKind.FORK, machines=[big.id], snapshot=kept.id, source=big.id, action="fork"
        )
    async with store.read() as tx:
        assert await images.every(tx) == [IMAGE]
        assert await snapshots.get(tx, kept.id) == kept
        assert await snapshots.template(tx, IMAGE.id, SHAPE) == snapshot(1)
        assert await machines.every(tx) == [big]
        assert [event.detail for event in await events.after(tx, DEFAULT_TENANT, 0, 0)] == ["«ä»"]
        assert await intents.unfinished(tx) == [intent]
        assert await snapshots.made_of(tx, SnapshotId("s-000000000001")) == [kept]


async def test_all_of_a_transaction_or_nothing(store: Store) -> None:
    async def add(number: int, name: str) -> None:
        async with store.write() as tx:
            await machines.add(tx, [machine(number)])
            await machines.add(tx, [machine(number + 100, name)])

    await add(1, "web")
    with pytest.raises(sa.exc.IntegrityError):
        await add(2, "web")
    cancelled = asyncio.create_task(add(3, "other"))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    await add(4, "late")
    async with store.read() as tx:
        assert {m.name for m in await machines.every(tx)} - {"m3", "other"} == {"m1", "web", "m4", "late"}


async def test_names_that_begin_alike_and_pages(store: Store) -> None:
    others = ["web", "web-1", "web-10", "web.1", "web0", "webb", "we-1", "zz"]
    async with store.write() as tx:
        await machines.add(tx, [machine(n, name, created_us=7) for n, name in enumerate(others)])
    async with store.read() as tx:
        assert await machines.names(tx, DEFAULT_TENANT, "web-") == {"web-1", "web-10"}
        assert await machines.names(tx, DEFAULT_TENANT, "web") == {"web", "web-1", "web-10", "web.1", "web0", "webb"}
        first = await machines.page(tx, DEFAULT_TENANT, limit=5)
        rest = await machines.page(tx, DEFAULT_TENANT, limit=5, after=(first[-1].created_us, first[-1].id))
        assert [m.name for m in (*first, *rest)] == others
        assert [m.name for m in await machines.page(tx, DEFAULT_TENANT, limit=1, name_prefix="web-")] == ["web-1"]


async def test_what_a_tenant_has_is_added_up(store: Store) -> None:
    async with store.write() as tx:
        nothing = await usage.of_tenant(tx, DEFAULT_TENANT, forks_since_us=0)
        assert nothing == Usage()
        states = [MachineState.RUNNING, MachineState.PAUSED, MachineState.STOPPED, MachineState.HIBERNATED]
        await machines.add(tx, [machine(n, state=state) for n, state in enumerate(states)])
        await machines.add(tx, [machine(9, tenant="blue")])
        kinds = [SnapshotKind.KEPT, SnapshotKind.FORK, SnapshotKind.TEMPLATE]
        size = {"own_memory_bytes": 3 << 19, "own_disk_bytes": 1 << 20}
        await snapshots.save(tx, [snapshot(n, kind=kind, **size) for n, kind in enumerate(kinds)])
        await snapshots.save(tx, [snapshot(9, tenant="blue", kind=SnapshotKind.KEPT, **size)])
        for kind in (IntentKind.FORK, IntentKind.FORK, IntentKind.RUN):
            last = await intents.add(tx, kind, tenant=DEFAULT_TENANT)
        await intents.end(tx, last, IntentStatus.UNDONE)
        for tenant in ("blue", DEFAULT_TENANT, DEFAULT_TENANT, DEFAULT_TENANT):
            taken = await intents.add(tx, IntentKind.SNAPSHOT, tenant=tenant)
        await intents.end(tx, taken, IntentStatus.DONE)  # the other two of the tenant's are being taken
    async with store.read() as tx:
        stopped = [MachineId(f"m-{2:012x}")]
        has = await usage.of_tenant(tx, DEFAULT_TENANT, starting=stopped, forks_since_us=now_us() - 60_000_000)
        assert has == Usage(
            machines=4,
            cpus=3,
            memory_mib=3 * 512,
            disk_mib=4 * 2048 + 5,
            snapshots=3,
            forks_per_minute=2,
        )
        assert (await usage.of_tenant(tx, DEFAULT_TENANT, forks_since_us=now_us())).forks_per_minute == 0


async def test_readers_see_one_state(store: Store) -> None:
    async with store.read() as tx:
        assert await machines.count(tx, DEFAULT_TENANT) == 0
        async with store.write() as other:
            await machines.add(other, [machine(1)])
        assert await machines.count(tx, DEFAULT_TENANT) == 0


async def test_what_need_not_last_is_not_waited_for(store: Store) -> None:
    """As the engines say themselves: that nothing is lost shows in a power cut only."""
    asked, on, off = ("SHOW synchronous_commit", "on", "off") if store.is_shared else ("PRAGMA synchronous", 2, 1)
    for lasts, expected in ((True, on), (False, off), (True, on)):
        async with store.write(lasts=lasts) as tx:
            assert await tx.scalar(sa.text(asked)) == expected
            await machines.add(tx, [machine(await machines.count(tx, DEFAULT_TENANT))])
    async with store.glance() as tx:
        assert await machines.count(tx, DEFAULT_TENANT) == 3


async def test_what_need_not_last_is_written_back_nevertheless(store: Store) -> None:
    """SQLite's log stays within the room that is set aside for it, whoever writes."""
    if not isinstance(store.where, Path):
        return
    log = store.where.with_name(store.where.name + "-wal")
    room = log.stat().st_size
    for number in range(100):
        async with store.write(lasts=False) as tx:
            await events.add(tx, "machine.paused", f"m-{number:012x}", "web" * 20, tenant=DEFAULT_TENANT)
            await machines.add(tx, [machine(number)])
    assert log.stat().st_size <= room


# -- migrations --------------------------------------------------------------------------------------------------------


def _fill_first(connection: sa.Connection) -> None:
    schema.upgrade(connection, "0001")
    for statement in _FIRST_ROWS:
        connection.execute(sa.text(statement))


async def test_migrations_go_forward_on_a_database_with_data(at: Path | str) -> None:
    if isinstance(at, str):
        raw = create_async_engine(postgres.address(at))
        try:
            async with raw.begin() as tx:
                await tx.execute(sa.text("DROP SCHEMA public CASCADE"))
                await tx.execute(sa.text("CREATE SCHEMA public"))
                await tx.run_sync(_fill_first)
        finally:
            await raw.dispose()
    else:
        made = sa.create_engine(sa.URL.create("sqlite", database=str(at)))
        with made.begin() as first:
            _fill_first(first)
        made.dispose()
    store = await Store.open(at)
    try:
        async with store.read() as tx:
            web, kid = await machines.every(tx)
            assert (web.name, web.shape) == ("web", SHAPE)
            assert kid.snapshot == "s-000000000002"
            assert kid.config == Machine.__dataclass_fields__["config"].default
            base, child = await snapshots.every(tx)
            assert (base.tag, base.message, base.own_disk_bytes) == ("base", "", 0)
            assert child.parent == base.id
            assert await snapshots.template(tx, IMAGE.id, SHAPE) == base
            assert [i.forget_files for i in await images.every(tx)] == [()]
            [intent] = await intents.unfinished(tx)
            assert (intent.kind, intent.machines, intent.owner) == (IntentKind.RUN, ("m-00000000000b",), None)
            assert [e.kind for e in await events.after(tx, DEFAULT_TENANT, 0, 0)] == ["machine.created"]
        async with store.write() as tx:
            # Numbers go on where they were, or beyond what a power cut may have taken.
            assert (await intents.add(tx, IntentKind.CHANGE)).id == 2
            await events.add(tx, "later", "m-00000000000a")
            assert [e.sequence for e in await events.after(tx, DEFAULT_TENANT, 0, 0)] in ([1, 2], [1, 1002])
    finally:
        await store.close()
    await (await Store.open(at)).close()  # nothing is left to do


_SHAPE_SQL = "1, 512, 2048"
_FIRST_ROWS = (
    *(
        "INSERT INTO snapshots (id, tag, kind, parent, image, cpus, memory_mib, disk_mib, machine_type, qemu_build, "
        "accelerator, cpu_model, pause_ms, own_memory_bytes, settled, created_us, removing) VALUES "
        f"('{id_}', {tag}, '{kind}', {parent}, '{IMAGE.id}', {_SHAPE_SQL}, 'q35', '7.2', 'tcg', 'max', 1.5, "
        f"5000000000, true, {created}, false)"
        for id_, tag, kind, parent, created in (
            ("s-000000000001", "'base'", "template", "NULL", 1),
            ("s-000000000002", "NULL", "fork", "'s-000000000001'", 2),
        )
    ),
    *(
        "INSERT INTO machines (id, name, state, image, image_name, cpus, memory_mib, disk_mib, snapshot, qemu_pid, "
        "failure, accelerator, accelerator_reason, created_us) VALUES "
        f"('{id_}', '{name}', '{state}', '{IMAGE.id}', 'debian-12', {_SHAPE_SQL}, 's-000000000002', 7, '', 'tcg', '', "
        f"{created})"
        for id_, name, state, created in (
            ("m-00000000000a", "web", "running", 1),
            ("m-00000000000b", "kid", "creating", 2),
        )
    ),
    "INSERT INTO images (id, name, size_bytes, kernel, sha256, created_us, description) VALUES "
    f"('{IMAGE.id}', 'debian-12', 1, '6.1', '', 1, '')",
    "INSERT INTO templates (image, cpus, memory_mib, disk_mib, snapshot) VALUES "
    f"('{IMAGE.id}', {_SHAPE_SQL}, 's-000000000001')",
    "INSERT INTO operations (kind, status, machines, arguments, error, started_us) VALUES ('run', 'open', "
    """'["m-00000000000b"]', '{}', '', 1)""",
    "INSERT INTO events (time_us, kind, subject, detail) VALUES (1, 'machine.created', 'm-00000000000a', '')",
)


async def test_database_of_a_later_version_is_refused(at: Path | str, store: Store) -> None:
    async with store.write() as tx:
        await tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        with pytest.raises(errors.NotPossibleNow, match="another version"):
            await Store.open(at)
    finally:
        async with store.write() as tx:
            await tx.execute(sa.text("DROP TABLE alembic_version"))
            if isinstance(at, str):  # the others use it too
                await tx.execute(sa.text("DROP SCHEMA public CASCADE"))
                await tx.execute(sa.text("CREATE SCHEMA public"))


# -- SQLite alone ------------------------------------------------------------------------------------------------------


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


async def test_another_process_that_writes_holds_up_writers_alone(tmp_path: Path) -> None:
    path = tmp_path / "controller.db"
    store = await Store.open(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        async def add() -> None:
            async with store.write() as tx:
                await machines.add(tx, [machine(1)])

        adding = asyncio.create_task(add())
        for _ in range(3):  # in an event loop that goes on
            await asyncio.sleep(0.02)
            async with store.read() as tx:
                assert await machines.count(tx, DEFAULT_TENANT) == 0
        assert not adding.done()
        other.execute("ROLLBACK")
        await asyncio.wait_for(adding, 30)
    await store.close()


async def test_an_interrupted_transaction_leaves_no_lock(tmp_path: Path) -> None:
    """A caller that is cancelled between a SELECT and its rows: SQLAlchemy gives the connection up, its traceback holds
    the cursor."""
    path = tmp_path / "controller.db"
    store = await Store.open(path)
    async with store.write() as connection:
        await connection.execute(sa.text("CREATE TABLE things AS SELECT 1 AS thing UNION SELECT 2"))
    with pytest.raises(ZeroDivisionError):
        async with store.write() as connection:
            await connection.execute(sa.text("INSERT INTO things VALUES (3)"))
            driver: Any = (await connection.get_raw_connection()).driver_connection
            cursor = driver.execute("SELECT thing FROM things")
            await connection.invalidate()
            raise ZeroDivisionError
    await store.close()
    with sqlite3.connect(path, isolation_level=None, timeout=0) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM things").fetchone() == (2,)
        other.execute("ROLLBACK")
    assert cursor.description


# -- PostgreSQL alone --------------------------------------------------------------------------------------------------


async def test_writers_of_several_controllers_take_turns(emptied: str) -> None:
    one, other = await asyncio.gather(Store.open(emptied), Store.open(emptied))
    try:

        async def count_up(store: Store) -> None:
            async with store.write() as tx:
                seen = await machines.count(tx, DEFAULT_TENANT)  # what none of the others may change now
                await asyncio.sleep(0.005)
                await machines.add(tx, [machine(seen, f"m{seen}")])

        await asyncio.gather(*(count_up(store) for store in (one, other) for _ in range(10)))
        async with one.read() as tx:
            assert await machines.count(tx, DEFAULT_TENANT) == 20
    finally:
        await one.close()
        await other.close()


async def test_writer_that_stands_still_loses_its_turn(emptied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await Store.open(emptied)
    monkeypatch.setattr(postgres, "_IDLE_S", 1)
    one = await Store.open(emptied)
    try:
        with pytest.raises((errors.HostUnreachable, errors.NotPossibleNow)):
            async with one.write() as stuck:
                await machines.add(stuck, [machine(1)])
                async with other.write() as tx:  # waits until the server ends the other one's transaction
                    await machines.add(tx, [machine(1, "mine")])
        async with one.read() as tx:
            assert await machines.names(tx, DEFAULT_TENANT, "m") == {"mine"}
    finally:
        await one.close()
        await other.close()


async def test_a_server_that_stands_still_is_given_up_soon(server: Postgres, emptied: str) -> None:
    """Whoever reads, or waits for the turn to write. The driver's own time-outs would add up to half a minute."""
    store = await Store.open(emptied)

    async def read() -> None:
        async with store.glance() as tx:
            await machines.get(tx, "m-000000000001")

    async def write() -> None:
        async with store.write():
            pass

    async def refused(work: Callable[[], Awaitable[None]]) -> float:
        began = time.monotonic()
        with pytest.raises(errors.HostUnreachable, match="can't be reached"):
            await work()
        return time.monotonic() - began

    try:
        await asyncio.gather(read(), write())
        with server.still():
            assert max(await asyncio.gather(refused(read), refused(write))) < 20.0
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(errors.HostUnreachable):
                    await asyncio.gather(read(), write())
                    break
                await asyncio.sleep(0.1)
    finally:
        await store.close()


async def test_statements_that_are_told_together(store: Store) -> None:
    """All of them or none, whatever the engine."""
    async with store.write() as tx:
        await machines.add(tx, [machine(1)])
        intent = await intents.add(tx, IntentKind.CHANGE, machines=[MachineId(machine(1).id)])
    ended = [machines.saving(machine(1, name="other")), intents.ending(intent, IntentStatus.DONE)]
    async with store.write() as tx:
        await events.add(tx, "first", "m-000000000001", "it's", along=ended)
    with pytest.raises(IntegrityError):
        async with store.write() as tx:
            await machines.add(tx, [machine(2, name="taken")])
            taken = [intents.ending(intent, IntentStatus.UNDONE), machines.saving(machine(1, name="taken"))]
            await events.add(tx, "second", "m-000000000001", along=taken)
    async with store.read() as tx:
        assert await machines.names_of(tx, DEFAULT_TENANT) == {"other"}
        assert await intents.unfinished_about(tx, machine(1).id) == []
        assert await intents.undone_ids(tx) == frozenset()
        assert [(e.kind, e.detail) for e in await events.after(tx, DEFAULT_TENANT, 0, 0)] == [("first", "it's")]


async def test_dead_controller_writes_nothing_more(emptied: str) -> None:
    store, other = await Store.open(emptied), await Store.open(emptied)
    try:
        async with store.write() as tx:
            number = await leases.join(tx, "one", 0)
        store.standing = Standing(leases.row_of("one"), number)
        async with store.write() as tx:
            intent = await intents.add(tx, IntentKind.CHANGE)
        assert intent.owner == number
        async with other.write() as tx:
            await leases.bury(tx, "one", number)
            assert number not in await leases.living(tx)
        with pytest.raises(Superseded, match="stood still"):
            async with store.write() as tx:
                await intents.end(tx, intent, IntentStatus.DONE)
        async with other.write() as tx:
            assert [i.status for i in await intents.unfinished(tx)] == [IntentStatus.OPEN]
            assert await leases.join(tx, "one", 0) > number + 1
    finally:
        await store.close()
        await other.close()


async def test_errors_of_the_server_are_told(server: Postgres, emptied: str) -> None:
    for state, error, words in (
        ("53100", errors.ResourceExhausted, r"disk of the controller's database .* is full"),
        ("53300", errors.ResourceExhausted, "no connection to spare"),
        ("25006", errors.NotPossibleNow, "primary"),
        ("55P03", errors.NotPossibleNow, "busy for too long"),
        ("42501", errors.InvalidRequest, "owner of the database"),
        ("XX001", errors.InternalError, "damaged"),
    ):
        store = await Store.open(emptied)
        try:
            with pytest.raises(error, match=words):
                async with store.write() as tx:
                    raised = f"DO $$ BEGIN RAISE EXCEPTION 'told so' USING ERRCODE = '{state}'; END $$"
                    await tx.execute(sa.text(raised))
        finally:
            await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own takes a mount, and that root")
async def test_full_disk_of_the_database_is_told_and_gone_through() -> None:
    """On a server of its own: what has no room fails for all of a server's databases."""
    with postgres_rig.postgres() as server, contextlib.ExitStack() as mounts:
        small = server.directory / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tmpfs", str(small)], check=True)
        mounts.callback(subprocess.run, ["umount", "-l", str(small)], check=True)
        (small / "space").mkdir()
        os.chown(small / "space", server.directory.stat().st_uid, -1)
        server.sql(f"CREATE TABLESPACE small LOCATION '{small / 'space'}'")
        server.sql("CREATE DATABASE small TABLESPACE small")
        store = await Store.open(server.url("small"))
        try:
            server.sql("CHECKPOINT")  # or what the new database still has in memory would need the room, to be read
            (small / "ballast").write_bytes(bytes(6 << 20))
            with pytest.raises(errors.ResourceExhausted, match=r"disk of the controller's database .* is full"):
                for number in range(1000):
                    async with store.write() as tx:
                        await events.add(tx, "filler", str(number), _noise())
            async with store.read() as tx:
                assert len(await events.after(tx, DEFAULT_TENANT, 0, 0)) == number
            (small / "ballast").unlink()
            async with store.write() as tx:
                await events.add(tx, "goes on", "m-1")
        finally:
            await store.close()


def _noise() -> str:
    """Text that does not get smaller."""
    return secrets.token_hex(200_000)
