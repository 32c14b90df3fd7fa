"""Rows of operations: what was asked for, before, while and after it is done."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.principal import principal
from forkypig.controller.store.tables import operations as table
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.daemon.server import now_us
from forkypig.model import MachineId, SnapshotId

_OPEN = (IntentStatus.OPEN.value, IntentStatus.UNDOING.value)
# Ended operations are kept for those who look for what happened, and for machines of undone ones that turn up late.
KEPT = 2_000
_COUNTED_US = 60_000_000  # the quota of forks per minute counts them


def _intent(row: Any) -> Intent:
    return Intent(
        id=row.id,
        kind=IntentKind(row.kind),
        status=IntentStatus(row.status),
        machines=tuple(MachineId(m) for m in json.loads(row.machines)),
        snapshot=SnapshotId(row.snapshot) if row.snapshot else None,
        source=MachineId(row.source) if row.source else None,
        arguments=json.loads(row.arguments),
        tenant=row.tenant,
    )


async def add(
    connection: AsyncConnection,
    kind: IntentKind,
    *,
    machines: Sequence[MachineId] = (),
    snapshot: SnapshotId | None = None,
    source: MachineId | None = None,
    tenant: str | None = None,
    **arguments: str | float | bool,
) -> Intent:
    """Writes down what is going to be done. `tenant` None: that of whoever asks."""
    whose = principal().tenant if tenant is None else tenant
    now = now_us()
    values = {
        "kind": kind.value,
        "status": IntentStatus.OPEN.value,
        "machines": json.dumps(machines),
        "snapshot": snapshot,
        "source": source,
        "arguments": json.dumps(arguments),
        "error": "",
        "started_us": now,
        "tenant": whose,
    }
    number = (await connection.execute(insert(table).values(values).returning(table.c.id))).scalar_one()
    old = (table.c.id <= number - KEPT) & (table.c.started_us < now - _COUNTED_US)
    await connection.execute(delete(table).where(old, table.c.status.not_in(_OPEN)))
    return Intent(
        id=number,
        kind=kind,
        machines=tuple(machines),
        snapshot=snapshot,
        source=source,
        arguments=arguments,
        tenant=whose,
    )


async def end(connection: AsyncConnection, intent: Intent, status: IntentStatus, error: str = "") -> None:
    """DONE, UNDONE, or UNDOING with the reason."""
    values: dict[str, Any] = {"status": status.value}
    if error:
        values["error"] = error
    if status is not IntentStatus.UNDOING:
        values["ended_us"] = now_us()
    await connection.execute(update(table).where(table.c.id == intent.id).values(values))


async def unfinished(connection: AsyncConnection) -> list[Intent]:
    """Those that are open or being undone, oldest first."""
    rows = await connection.execute(select(table).where(table.c.status.in_(_OPEN)).order_by(table.c.id))
    return [_intent(row) for row in rows]


async def forks_since(connection: AsyncConnection, tenant: str, started_us: int) -> int:
    """How many forks a tenant asked for after a moment, whatever became of them."""
    found = await connection.execute(
        select(func.count())
        .select_from(table)
        .where(table.c.tenant == tenant, table.c.started_us > started_us, table.c.kind == IntentKind.FORK.value)
    )
    return int(found.scalar_one())


async def undone_ids(connection: AsyncConnection) -> frozenset[str]:
    """What the undone ones would have made."""
    rows = await connection.execute(select(table).where(table.c.status == IntentStatus.UNDONE.value))
    return frozenset(made for row in rows for made in _intent(row).makes)
