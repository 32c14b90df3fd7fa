"""Pools: making, scaling and removing them, and what is known of them while the controller runs.

The database holds the pools, which machines wait in which, and the leases. Once a second it is compared with what is
held here: another controller may have changed it, a machine may have died as it waited, a lease may be over.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import structlog

from forkypig.controller.changes import Changes
from forkypig.controller.desk import Desk
from forkypig.controller.images import Images
from forkypig.controller.pools.acquiring import Acquiring, Wish
from forkypig.controller.pools.filler import Filler
from forkypig.controller.pools.leases import PoolLeases
from forkypig.controller.pools.live_pool import LivePool
from forkypig.controller.pools.runs import PoolRuns
from forkypig.controller.pools.sources import check_still_there, pool_of
from forkypig.controller.principal import principal
from forkypig.controller.store import events, machines, pools
from forkypig.controller.templates import Templates
from forkypig.core.pools import check_sizes
from forkypig.daemon.server import now_us
from forkypig.errors import AlreadyExists, ForkyError, InvalidRequest, NotFound
from forkypig.model import (
    Acquired,
    ImageId,
    Lease,
    Machine,
    MachineConfig,
    MachineId,
    MachineState,
    Pool,
    PoolId,
    PoolStatus,
    Shape,
    SnapshotId,
    check_name,
    new_pool_id,
)

log = structlog.get_logger()

_LOOK_S = 1.0
_LONGEST_NAME = 54  # machines are called NAME-3f2a1b7c at most


class Pools:
    """All pools of this controller."""

    def __init__(self, desk: Desk, changes: Changes, images: Images, templates: Templates) -> None:
        self._desk, self._images = desk, images
        self._leases = PoolLeases(desk, changes)
        self.filler = Filler(desk, self._leases, templates)
        self._acquiring = Acquiring(desk, self._leases)
        self._runs = PoolRuns(desk)
        self._live: dict[PoolId, LivePool] = {}
        self._by_name: dict[tuple[str, str], LivePool] = {}  # of a tenant
        self._going: set[PoolId] = set()  # under removal here
        self._loaded = asyncio.Event()
        self._comparing = asyncio.Lock()
        self._tasks: asyncio.TaskGroup | None = None

    # -- making and changing -------------------------------------------------------------------------------------------

    async def create(self, name: str, source: str, shape: Shape, target: int, most: int) -> PoolStatus:
        """A new pool, which fills in the background. Raises InvalidRequest, NotFound, AlreadyExists."""
        check_name("pool", name)
        if len(name) > _LONGEST_NAME:
            raise InvalidRequest(f"«{name}» is too long for a pool's name: use at most {_LONGEST_NAME} characters")
        check_sizes(target, most)
        await self._loaded.wait()
        desk, tenant = self._desk, principal().tenant
        pool = replace(
            await pool_of(desk, self._images, source, shape),
            id=new_pool_id(),
            name=name,
            tenant=tenant,
            target=target,
            max=most,
            created_us=now_us(),
        )
        async with desk.store.write() as tx:
            if await pools.by_name(tx, tenant, name) is not None:
                raise AlreadyExists("pool", name)
            await check_still_there(tx, pool)
            await pools.add(tx, pool)
            await events.add(tx, "pool.created", pool.id, f"{name}, of {source}: {target} ready, {most} at most")
        # Whoever compared meanwhile has found it already.
        return await self._status(self._live.get(pool.id) or self._take_up(pool))

    async def scale(self, name: str, target: int | None, most: int | None) -> PoolStatus:
        """Other sizes; None: as it is."""
        live = await self._find(name)
        pool = live.pool
        target = pool.target if target is None else target
        most = pool.max if most is None else most
        check_sizes(target, most)
        async with self._desk.store.write() as tx:
            await pools.set_sizes(tx, pool.id, target, most)
            await events.add(tx, "pool.scaled", pool.id, f"{name}: {target} ready, {most} at most")
        live.pool = replace(live.pool, target=target, max=most)
        live.changed.set()
        return await self._status(live)

    async def remove(self, name: str) -> None:
        """Removes a pool and the machines that wait in it. Those that are acquired stay until their leases end."""
        live = await self._find(name)
        async with self._desk.store.write() as tx:
            await pools.set_removing(tx, live.pool.id)
        live.close()
        await self._desk.journal.carry(self._finish_removal(live))

    async def _finish_removal(self, live: LivePool) -> None:
        desk, pool = self._desk, live.pool
        if pool.id in self._going:
            return
        self._going.add(pool.id)
        try:
            live.close()
            await self.filler.empty(live)
            async with desk.store.write() as tx:
                # One that the reconciler is still to undo keeps the pool; the next look comes back to it.
                if any(m.pool == pool.id for m in await machines.in_pools(tx)):
                    return
                await pools.delete_one(tx, pool.id)
                await events.add(tx, "pool.removed", pool.id, pool.name)
            self._drop(live)
        finally:
            self._going.discard(pool.id)
        desk.reconciler.collect.set()  # the snapshot that it began with may be nobody's now

    # -- looking -------------------------------------------------------------------------------------------------------

    async def every(self, *, contents: bool) -> list[PoolStatus]:
        """The tenant's, oldest first. `contents`: with machines and leases."""
        await self._loaded.wait()
        tenant = principal().tenant
        found = [live for live in self._live.values() if live.pool.tenant == tenant and not live.closed]
        return [await self._status(live, contents=contents) for live in sorted(found, key=lambda v: v.pool.created_us)]

    async def get(self, name: str) -> PoolStatus:
        return await self._status(await self._find(name))

    async def _status(self, live: LivePool, *, contents: bool = True) -> PoolStatus:
        stock = live.stock
        waiting: tuple[Machine, ...] = ()
        held: tuple[Lease, ...] = ()
        if contents:
            async with self._desk.store.read() as tx:
                waiting = tuple(m for m in await machines.in_pools(tx) if m.pool == live.pool.id)
            held = tuple(
                lease for lease in self._desk.leases.held.values() if lease.pool == live.pool.id and lease.expires_us
            )
        return PoolStatus(
            pool=live.pool,
            ready=stock.ready,
            filling=stock.filling,
            acquired=stock.acquired,
            waiting=stock.waiting,
            wanted=live.wanted,
            failure=live.failure,
            machines=waiting,
            leases=held,
        )

    async def _find(self, name: str) -> LivePool:
        await self._loaded.wait()
        known = (principal().tenant, check_name("pool", name))
        if known not in self._by_name and self._desk.store.is_shared:
            await self._compare()  # another controller may have made it a moment ago
        live = self._by_name.get(known)
        if live is None or live.closed:
            raise NotFound("pool", name, "see forky pool ls")
        return live

    # -- acquiring -----------------------------------------------------------------------------------------------------

    async def acquire(self, name: str, wish: Wish) -> Acquired:
        """See Acquiring."""
        live = await self._find(name)
        self.filler.give_way()
        return await self._acquiring.acquire(live, wish)

    def fitting(self, image: ImageId, shape: Shape, snapshot: SnapshotId | None) -> LivePool | None:
        """A pool of the caller's tenant where a machine is ready that begins as this snapshot, or, None, as the
        template of this image and shape."""
        tenant = principal().tenant
        for live in self._live.values():
            pool = live.pool
            begins_so = pool.snapshot == snapshot if snapshot else pool.from_image
            same = begins_so and pool.image == image and pool.shape == shape and pool.tenant == tenant
            if same and not live.closed and live.line.ready and not live.line.waiting:
                return live
        return None

    async def take(
        self, live: LivePool, name: str, config: MachineConfig, ttl_s: float, check: Callable[[], None]
    ) -> Machine | None:
        """See PoolRuns."""
        live.demand.note(asyncio.get_running_loop().time())
        self.filler.give_way()
        return await self._runs.take(live, name, config, ttl_s, check)

    async def release(self, machine: str, *, recycle: bool) -> None:
        """Ends an acquired machine. `recycle`: its pool has another in its place at once, not when there is time."""
        self.filler.give_way()
        lease = await self._leases.release(machine)
        if (live := self._live.get(lease.pool)) is not None:
            live.acquired = max(0, live.acquired - 1)
            live.demand.stir(asyncio.get_running_loop().time())
            live.owed += recycle
            live.changed.set()

    async def renew(self, machine: str, ttl_s: float) -> Lease:
        """See PoolLeases."""
        return await self._leases.renew(machine, ttl_s)

    # -- what the database says ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks for ever: once a second while there may be something to look after."""
        desk = self._desk
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                try:
                    await self._compare()
                    self._loaded.set()
                    await self._leases.look()
                except ForkyError as error:
                    log.warning("pools not looked after", error=str(error))
                except Exception:  # the edge of a task that leases rely on
                    log.exception("looking after pools failed")
                # Without pools there is nothing to see, unless other controllers make some.
                has_to_look = self._live or desk.leases.held or desk.store.is_shared
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S if has_to_look else None):
                        await desk.leases.to_look.wait()
                desk.leases.to_look.clear()

    async def _compare(self) -> None:
        async with self._comparing:
            known = list(self._live.values())
            for live in known:
                live.fresh.clear()
            self._desk.leases.fresh.clear()
            async with self._desk.store.read() as tx:
                rows, going = await pools.every(tx), await pools.removing(tx)
                waiting, held = await machines.in_pools(tx), await pools.leases(tx)
            self._desk.leases.refresh(held)
            there = {row.id for row in rows}
            for live in known:
                if live.pool.id not in there:  # another controller has removed it
                    self._drop(live)
            for row in rows:
                live = self._live.get(row.id) or self._take_up(row)
                live.pool = row
                if row.id in going:
                    self._desk.journal.begin(self._finish_removal(live))
                    continue
                self._sort(live, [m for m in waiting if m.pool == row.id])

    def _sort(self, live: LivePool, waiting: list[Machine]) -> None:
        """Which of them are ready, and which will never be."""
        journal = self._desk.journal
        live.acquired = sum(lease.pool == live.pool.id for lease in self._desk.leases.held.values())
        ready = {m.id for m in waiting if m.state is MachineState.PAUSED}
        live.line.keep(ready | live.fresh)
        making = {m.id for m in waiting if m.state is MachineState.CREATING} - live.fresh
        live.elsewhere = sum(not journal.concerns(machine) for machine in making)
        for machine in waiting:
            if journal.concerns(machine.id):
                continue
            if machine.id in ready:
                if machine.id not in live.line.ready and machine.id not in live.in_hand:
                    live.put(machine.id)
            elif machine.state not in (MachineState.CREATING, MachineState.REMOVING):
                why = machine.failure or f"it was found {machine.state.value}"
                journal.begin(self._leases.dispose(live.pool, MachineId(machine.id), why))
        live.changed.set()

    def _take_up(self, pool: Pool) -> LivePool:
        live = self._live[pool.id] = self._by_name[pool.tenant, pool.name] = LivePool(pool)
        live.changed.set()
        assert self._tasks is not None
        self._tasks.create_task(self.filler.keep(live))
        self._desk.leases.to_look.set()
        return live

    def _drop(self, live: LivePool) -> None:
        live.close()
        self._live.pop(live.pool.id, None)
        if self._by_name.get((live.pool.tenant, live.pool.name)) is live:
            del self._by_name[live.pool.tenant, live.pool.name]
