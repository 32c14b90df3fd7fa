"""What every operation needs: the database, the host, the journal, the reconciler; how things are found by what users
call them; and the one way in which an operation that made machines is finished, or undone where it failed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.admission import Admission
from forkypig.controller.host import Host
from forkypig.controller.journal import Flight, Journal, operations_of
from forkypig.controller.leases import Leases, begin
from forkypig.controller.peers import Peers
from forkypig.controller.principal import principal
from forkypig.controller.reconciler import Reconciler
from forkypig.controller.store import Store, events, intents, machines, snapshots
from forkypig.core.intents import Intent, IntentStatus
from forkypig.errors import ForkyError, InvalidRequest, NotFound, PermissionDenied
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
    admission: Admission
    leases: Leases

    @contextlib.asynccontextmanager
    async def finishing(self, intent: Intent, made: Sequence[Machine]) -> AsyncIterator[AsyncConnection]:
        """The transaction at whose end an operation is done: what it has made is in the records, with the leases that
        were asked for."""
        async with self.store.write() as tx:
            yield tx
            await machines.save_known(tx, made)
            begun = await begin(tx, intent, made)
            await intents.end(tx, intent, IntentStatus.DONE)
        self.leases.began(begun)

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
                    subject = intent.source or str(intent.id)
                    await events.add(tx, f"{intent.kind.value}.failed", subject, str(error), tenant=intent.tenant)
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

    async def operation_on(self, tx: AsyncConnection, machine: Machine) -> str:
        """What is being done now with one; "": nothing."""
        others = operations_of(await self.peers.others_at(tx, machine.id)).get(machine.id, "")
        return self.journal.operation_on(machine) or others

    async def concerns(self, tx: AsyncConnection, thing: str) -> bool:
        """Whether an operation under way, at any controller, is about this id."""
        return self.journal.concerns(thing) or bool(await self.peers.others_at(tx, thing))


async def find_machine(tx: AsyncConnection, text: str) -> Machine:
    """The asking tenant's, by id or name. Raises InvalidRequest where `text` can be neither, NotFound where it is none
    of theirs: another tenant's is not there, and one that waits in a pool is nobody's yet."""
    tenant = principal().tenant
    if is_id(text):
        found = await machines.one_of_tenant(tx, tenant, text)
    else:
        found = await machines.by_name(tx, tenant, check_name("machine", text))
    if found is None or found.pool is not None:
        raise NotFound("machine", text, "see forky ps")
    return found


async def find_snapshot(tx: AsyncConnection, text: str) -> Snapshot:
    """The asking tenant's, or one that is shared with it, by id, tag, or the beginning of an id that no other of them
    has. Raises InvalidRequest where `text` can be none of these or is said of several, NotFound where it is none."""
    if is_id(text):
        found = await _by_id(tx, text)
    else:
        found = await _by_tag_or_prefix(tx, check_name("snapshot", text))
    if found is None:
        raise NotFound("snapshot", text, "see forky snapshots")
    return found


async def find_own_snapshot(tx: AsyncConnection, text: str) -> Snapshot:
    """As `find_snapshot`, for what only its tenant may do. Raises PermissionDenied for one that is shared with them."""
    found = await find_snapshot(tx, text)
    if found.tenant != principal().tenant:
        raise PermissionDenied(
            f"snapshot {found.id} is tenant «{found.tenant}»'s, who shares it: machines can be started from it, and no "
            "more"
        )
    return found


async def _by_id(tx: AsyncConnection, text: str) -> Snapshot | None:
    found = await snapshots.seen_by(tx, principal().tenant, whole=text)
    return found[0] if found else None


async def _by_tag(tx: AsyncConnection, text: str) -> Snapshot | None:
    """The tenant's own goes before what others share."""
    tenant = principal().tenant
    if (found := await snapshots.by_tag(tx, tenant, text)) is not None:
        return found
    return _the_one(await snapshots.seen_by(tx, tenant, tag=text), f"several tenants share a snapshot tagged «{text}»")


async def _by_tag_or_prefix(tx: AsyncConnection, text: str) -> Snapshot | None:
    if (found := await _by_tag(tx, text)) is not None or not (prefix := snapshot_prefix(text)):
        return found
    several = await snapshots.seen_by(tx, principal().tenant, prefix=prefix)
    return _the_one(several, f"«{text}» begins the ids of {len(several)} snapshots")


def _the_one(found: Sequence[Snapshot], several: str) -> Snapshot | None:
    """The only one, None of none. Raises InvalidRequest, beginning with `several`."""
    if len(found) > 1:
        named = ", ".join(f"{s.id} ({s.tag})" if s.tag else s.id for s in found[:_MOST_NAMED])
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise InvalidRequest(f"{several}: {named}{more}; write more of it")
    return found[0] if found else None


async def find_source(tx: AsyncConnection, text: str) -> Machine | Snapshot:
    """What is to be forked: a machine or a snapshot. Raises InvalidRequest where both are called so."""
    machine: Machine | None
    snapshot: Snapshot | None
    if is_id(text):
        machine = await machines.one_of_tenant(tx, principal().tenant, text)
        snapshot = await _by_id(tx, text)
    else:
        check_name("machine or snapshot", text)
        machine, snapshot = await machines.by_name(tx, principal().tenant, text), await _by_tag(tx, text)
        if machine is None and snapshot is None:
            snapshot = await _by_tag_or_prefix(tx, text)
        if machine is not None and snapshot is not None:
            if snapshot.tenant != principal().tenant:
                return machine  # what others share takes no name away
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


async def as_seen(tx: AsyncConnection, rows: Sequence[Snapshot]) -> list[Snapshot]:
    """Snapshots as the asking tenant may see them: what they stand on is told where that is the tenant's or shared
    with it; of one that others share, neither its machine nor who else has it."""
    tenant = principal().tenant
    parents = {row.parent for row in rows if row.parent is not None}
    visible = await snapshots.visible(tx, tenant, parents)
    sharing = await snapshots.sharing(tx)
    seen = []
    for row in rows:
        row = replace(row, parent=row.parent if row.parent in visible else None)
        own = row.tenant == tenant
        seen.append(replace(row, shared_with=sharing.get(row.id, ())) if own else replace(row, machine=None))
    return seen
