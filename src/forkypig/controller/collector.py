"""Removes snapshots: those that somebody wants gone, and those that came with a fork once nothing stands on them."""

import asyncio

import structlog

from forkypig.controller.desk import Desk
from forkypig.controller.journal import Flight
from forkypig.controller.store import events, intents, machines, pools, snapshots
from forkypig.core.genealogy import PASSING, Standing, collectable
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.errors import Busy, DeadlineExceeded, ForkyError, HostUnreachable, NotFound, NotPossibleNow
from forkypig.model import SnapshotId

log = structlog.get_logger()

# Removals come in crowds (`forky rm --all`): one look after the crowd finds whole branches that may go.
_GATHER_S = 0.1
_UNKNOWN = (HostUnreachable, DeadlineExceeded)  # the host may have done it or not


class Collector:
    """The only one that removes snapshots."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Collects whenever the reconciler's `collect` is set."""
        wanted = self._desk.reconciler.collect
        while True:
            await wanted.wait()
            await asyncio.sleep(_GATHER_S)
            wanted.clear()
            if not self._desk.peers.leads:
                self._desk.peers.wish()  # the leader reconciles, and then collects
                continue
            try:
                await self.collect()
            except ForkyError as error:
                log.warning("not collected", error=str(error))
            except Exception:  # the edge of a task
                log.exception("collecting failed")

    async def collect(self) -> None:
        """Removes every snapshot that came with a fork and that nothing stands on, leaves first."""
        async with self._turn:
            async with self._desk.store.read() as tx:
                every = await snapshots.every(tx)
                occupied = {m.snapshot for m in await machines.every(tx) if m.snapshot is not None}
                occupied |= set(await pools.grounds(tx))
                going = await snapshots.removing(tx)
                _, others = await self._desk.peers.sorted_intents(tx)
            held = going.union(*(i.names for i in others), (s.id for s in every if self._desk.journal.concerns(s.id)))
            for snapshot in collectable(every, occupied, held):
                try:
                    await self.remove(snapshot, collecting=True)
                except (NotFound, NotPossibleNow):
                    continue  # somebody was quicker, or stands on it now

    async def remove(self, snapshot: SnapshotId, *, collecting: bool = False) -> None:
        """Removes one. Raises NotPossibleNow, naming who, while something stands on it. `collecting`: only if it is
        still one that goes by itself."""
        desk = self._desk
        with desk.journal.flight() as flight:
            intent = await self._mark(flight, snapshot, collecting)
            try:
                await desk.host.remove_snapshot(snapshot)
            except _UNKNOWN:
                desk.reconciler.look_soon()  # the intent stays open: it is removed when the host is back
                raise
            except ForkyError as error:
                async with desk.store.write() as tx:
                    await snapshots.set_removing(tx, snapshot, removing=False)
                    await intents.end(tx, intent, IntentStatus.UNDONE, str(error))
                raise
            async with desk.store.write() as tx:
                await snapshots.delete_one(tx, snapshot)
                await intents.end(tx, intent, IntentStatus.DONE)
                await events.add(tx, "snapshot.removed", snapshot, tenant=intent.tenant)
        desk.reconciler.collect.set()

    async def _mark(self, flight: Flight, snapshot: SnapshotId, collecting: bool) -> Intent:
        """From here on nothing new can stand on it."""
        async with self._desk.store.write() as tx:
            row = await snapshots.get(tx, snapshot)
            if row is None:
                raise NotFound("snapshot", snapshot, "see forky snapshots")
            called = f"snapshot «{row.tag}»" if row.tag else f"snapshot {row.id}"
            # Before its machines: those that wait in a pool can't be removed by themselves.
            if (pool := (await pools.grounds(tx)).get(snapshot)) is not None:
                raise NotPossibleNow(
                    f"{called} can't be removed: the machines of pool «{pool}» begin with it; "
                    f"remove that first (forky pool rm {pool})"
                )
            standing = Standing(tuple(await machines.on(tx, snapshot)), tuple(await snapshots.made_of(tx, snapshot)))
            if standing:
                raise NotPossibleNow(
                    f"{called} can't be removed: {standing.sentence(row.tenant)} {standing.verb} on it; "
                    "remove that first"
                )
            if collecting and row.kind not in PASSING:
                raise NotPossibleNow(f"{called} was tagged meanwhile: it stays")
            if await self._desk.concerns(tx, snapshot):
                raise Busy(called, "in use by an operation under way")
            await snapshots.set_removing(tx, snapshot, removing=True)
            return flight.take(await intents.add(tx, IntentKind.REMOVE_SNAPSHOT, snapshot=snapshot, tenant=row.tenant))
