"""What every operation needs: the database, the host, the journal, the reconciler; how things are found by what users
call them; and the one way in which an operation that failed is undone."""

import asyncio
import contextlib
from dataclasses import dataclass, replace

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.host import Host
from forkypig.controller.journal import Flight, Journal, operations_of
from forkypig.controller.peers import Peers
from forkypig.controller.reconciler import Reconciler
from forkypig.controller.store import Store, events, intents, machines, snapshots
from forkypig.core.intents import IntentStatus
from forkypig.errors import ForkyError, InvalidRequest, NotFound
from forkypig.model import Machine, Snapshot, check_name
from forkypig.model.ids import is_id, snapshot_prefix

log = structlog.get_logger()

# An undo that needs longer goes on in the background; the caller has waited enough.
_UNDO_S = 30.0
_MOST_NAMED = 4  # snapshots whose ids begin alike


@dataclass(frozen=True, slots=True)
class Desk:
    """The tools of the operations."""

    store: Store
    host: Host
    journal: Journal
    reconciler: Reconciler
    peers: Peers

    async def undo(self, flight: Flight, error: ForkyError) -> None:
        """Marks what is in `flight` as failed and has the reconciler find out what is there and remove it.

        Never raises: the caller has the first error to tell.
        """
        failed = list(flight.intents)
        self.journal.failed.update(intent.id for intent in failed)
        with contextlib.suppress(ForkyError):  # told to the journal; a restart would then finish what it finds
            async with self.store.write() as tx:
                for intent in failed:
                    await intents.end(tx, intent, IntentStatus.UNDOING, str(error))
                    await events.add(tx, f"{intent.kind.value}.failed", intent.source or str(intent.id), str(error))
        flight.land()
        # Not in a task group: it outlives an undo that has taken too long, but not the journal's tasks.
        undoing = self.journal.begin(self.reconciler.settle(failed))
        try:
            async with asyncio.timeout(_UNDO_S):
                await asyncio.shield(undoing)
        except (ForkyError, TimeoutError) as trouble:
            log.warning("not undone yet", error=str(trouble))
            self.reconciler.look_soon()

    async def operations(self, tx: AsyncConnection) -> dict[str, str]:
        """What is being done now, by machine id: "forking". At all controllers that share the database."""
        if not self.store.is_shared:
            return self.journal.operations()
        _, others = await self.peers.sorted_intents(tx)
        return {**operations_of(others), **self.journal.operations()}

    async def concerns(self, tx: AsyncConnection, thing: str) -> bool:
        """Whether an operation under way, at any controller, is about this id."""
        if self.journal.concerns(thing):
            return True
        return self.store.is_shared and any(
            thing in intent.names for intent in (await self.peers.sorted_intents(tx))[1]
        )


async def find_machine(tx: AsyncConnection, text: str) -> Machine:
    """By id or name. Raises InvalidRequest where `text` can be neither, NotFound where it is none, or one that waits in
    a pool: that is nobody's yet."""
    found = await machines.get(tx, text) if is_id(text) else await machines.by_name(tx, check_name("machine", text))
    if found is None or found.pool is not None:
        raise NotFound("machine", text, "see forky ps")
    return found


async def find_snapshot(tx: AsyncConnection, text: str) -> Snapshot:
    """By id, tag, or the beginning of an id that no other has. Raises InvalidRequest where `text` can be none of these
    or begins several ids, NotFound where it is none."""
    found = await snapshots.get(tx, text) if is_id(text) else await _by_tag_or_prefix(tx, check_name("snapshot", text))
    if found is None:
        raise NotFound("snapshot", text, "see forky snapshots")
    return found


async def _by_tag_or_prefix(tx: AsyncConnection, text: str) -> Snapshot | None:
    if (found := await snapshots.by_tag(tx, text)) is not None or not (prefix := snapshot_prefix(text)):
        return found
    several = await snapshots.beginning_with(tx, prefix)
    if len(several) > 1:
        named = ", ".join(f"{s.id} ({s.tag})" if s.tag else s.id for s in several[:_MOST_NAMED])
        more = f" and {len(several) - _MOST_NAMED} more" if len(several) > _MOST_NAMED else ""
        raise InvalidRequest(f"«{text}» begins the ids of {len(several)} snapshots: {named}{more}; write more of it")
    return several[0] if several else None


async def find_source(tx: AsyncConnection, text: str) -> Machine | Snapshot:
    """What is to be forked: a machine or a snapshot. Raises InvalidRequest where both are called so."""
    if is_id(text):
        found: Machine | Snapshot | None = await machines.get(tx, text) or await snapshots.get(tx, text)
    else:
        check_name("machine or snapshot", text)
        machine, snapshot = await machines.by_name(tx, text), await snapshots.by_tag(tx, text)
        if machine is None and snapshot is None:
            snapshot = await _by_tag_or_prefix(tx, text)
        if machine is not None and snapshot is not None:
            raise InvalidRequest(
                f"«{text}» is a machine ({machine.id}) and a snapshot's tag ({snapshot.id}): say which by its id"
            )
        found = machine or snapshot
    if found is None or (isinstance(found, Machine) and found.pool is not None):
        raise NotFound("machine or snapshot", text, "see forky ps and forky snapshots")
    return found


async def known_parent(tx: AsyncConnection, snapshot: Snapshot) -> Snapshot:
    """The snapshot, its parent left out where that is not in the records."""
    known = snapshot.parent is not None and await snapshots.is_there(tx, snapshot.parent)
    return snapshot if known else replace(snapshot, parent=None)
