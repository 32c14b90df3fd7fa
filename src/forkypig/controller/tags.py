"""Tags: the names that users give to snapshots. One a snapshot, and one snapshot a tag."""

from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_own_snapshot
from forkypig.controller.principal import principal
from forkypig.controller.quotas import admit
from forkypig.controller.store import events, intents, snapshots
from forkypig.core.intents import IntentKind
from forkypig.errors import AlreadyExists, NotFound, NotPossibleNow
from forkypig.model import Snapshot, SnapshotKind, check_name
from forkypig.model.tenants import Usage


class Tags:
    """TagSnapshot and UntagSnapshot."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def add(self, snapshot: str, tag: str, *, force: bool) -> Snapshot:
        """Gives a snapshot a tag; it is kept from then on. `force`: takes it from another, or replaces one it has.

        Raises AlreadyExists, NotPossibleNow, NotFound, InvalidRequest."""
        return await self._desk.journal.carry(self._add(snapshot, tag, force))

    async def _add(self, text: str, tag: str, force: bool) -> Snapshot:
        check_name("snapshot", tag)
        await self._desk.reconciler.ensure_reachable()
        changed: list[Snapshot] = []
        async with self._desk.store.write() as tx:
            snapshot = await find_own_snapshot(tx, text)
            check_not_template(snapshot)
            if snapshot.tag == tag:
                return snapshot
            holder = await snapshots.by_tag(tx, snapshot.tenant, tag)
            if not force:
                if snapshot.tag:
                    raise NotPossibleNow(
                        f"snapshot {snapshot.id} is tagged «{snapshot.tag}» already, and has one tag at a time: "
                        f"replace it with --force"
                    )
                await check_tag_is_free(tx, tag)
            if snapshot.kind is not SnapshotKind.KEPT:
                await admit(tx, Usage(snapshots=1))
            if holder is not None:
                holder = replace(holder, tag="")
                changed.append(holder)
            snapshot = replace(snapshot, tag=tag, kind=SnapshotKind.KEPT)
            changed.append(snapshot)
            await snapshots.save(tx, changed)
            await events.add(tx, "snapshot.tagged", snapshot.id, tag)
        await self._tell_host(changed)
        return snapshot

    async def remove(self, tag: str) -> Snapshot:
        """Takes a tag away; its snapshot stays. Raises NotFound, NotPossibleNow for a template."""
        return await self._desk.journal.carry(self._remove(tag))

    async def _remove(self, tag: str) -> Snapshot:
        await self._desk.reconciler.ensure_reachable()
        async with self._desk.store.write() as tx:
            snapshot = await find_own_snapshot(tx, tag)
            check_not_template(snapshot)
            if snapshot.tag != tag:
                called = f"snapshot {snapshot.id} is tagged «{snapshot.tag}»" if snapshot.tag else "it has none"
                raise NotFound("tag", tag, f"{called}; see forky tag")
            snapshot = replace(snapshot, tag="")
            await snapshots.save(tx, [snapshot])
            await events.add(tx, "snapshot.untagged", snapshot.id, tag)
        await self._tell_host([snapshot])
        return snapshot

    async def _tell_host(self, changed: list[Snapshot]) -> None:
        """A kept snapshot is packed soon. What is told is for that, and for a controller that has lost its database."""
        for snapshot in changed:
            await self._desk.host.label(snapshot)


def check_not_template(snapshot: Snapshot) -> None:
    """Raises NotPossibleNow for a template, which the controller makes and replaces by itself."""
    if snapshot.kind is SnapshotKind.TEMPLATE:
        raise NotPossibleNow(
            f"snapshot {snapshot.id} is a template, which has no tag and is replaced when it has to be: "
            "keep a machine's state with forky snapshot MACHINE --tag TAG"
        )


async def check_tag_is_free(tx: AsyncConnection, tag: str) -> None:
    """Raises AlreadyExists where a snapshot of the asking tenant has the tag, or is being taken with it."""
    if not tag:
        return
    tenant = principal().tenant
    unfinished = await intents.unfinished(tx, tenant=tenant, kind=IntentKind.SNAPSHOT.value)
    if tag in (i.arguments.get("tag") for i in unfinished) or await snapshots.tag_is_taken(tx, tenant, tag):
        raise AlreadyExists("snapshot", tag)
