"""Fills pools: one task per pool decides, and one refill at a time is made: refills are to disturb as little as can be.

The machines and what they are for are written down before the host is asked, as for a fork: what a controller that dies
leaves half-filled is taken up or undone by the reconciler.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk
from forkypig.controller.pools.leases import PoolLeases
from forkypig.controller.pools.live_pool import LivePool
from forkypig.controller.principal import acting, for_tenant
from forkypig.controller.quotas import admit
from forkypig.controller.store import events, images, intents, machines, pools, snapshots
from forkypig.controller.templates import Templates
from forkypig.core.intents import IntentKind, IntentStatus
from forkypig.core.pools import MOST_AT_ONCE, missing, put_off_s, surplus
from forkypig.core.quotas import of_machines
from forkypig.core.reconcile import merge
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, NotFound
from forkypig.model import (
    ForkOptions,
    Machine,
    MachineState,
    Pool,
    Snapshot,
    new_machine_id,
)

log = structlog.get_logger()

_SOON_S = 0.5
_SETTLED_S = 0.02
_LOOK_S = 5.0  # demand grows old without an event
_PATIENCE_S, _MOST_PATIENCE_S = 1.0, 60.0  # before a refill that failed is tried again
_SHORT = "the host is short of memory, and it goes on by itself when there is more: hibernate or remove machines"


class Filler:
    """Keeps every pool as full as it is to be."""

    def __init__(self, desk: Desk, leases: PoolLeases, templates: Templates) -> None:
        self._desk, self._leases, self._templates = desk, leases, templates
        self._turn = asyncio.Lock()
        self._stirred_s = float("-inf")  # by the loop's clock

    def give_way(self) -> None:
        """Somebody is served, of whatever pool: refills are not to be in their way."""
        self._stirred_s = asyncio.get_running_loop().time()

    async def _lull(self, live: LivePool) -> None:
        """Returns when a refill disturbs nobody, or has been put off for long enough."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while not live.closed and (
            wait_s := put_off_s(live.stock, live.wanted, loop.time() - self._stirred_s, loop.time() - due_s)
        ):
            live.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await live.changed.wait()

    async def keep(self, live: LivePool) -> None:
        """Keeps one pool filled until it is closed."""
        patience_s = _PATIENCE_S
        while not live.closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await live.changed.wait()
            live.changed.clear()
            try:
                with acting(for_tenant(live.pool.tenant)):
                    await self._step(live)
                patience_s = _PATIENCE_S
            except Exception as error:
                if not isinstance(error, ForkyError):
                    log.exception("a pool's filler failed", pool=live.pool.name)
                await self._failed(live, str(error))
                await asyncio.sleep(patience_s)
                patience_s = min(patience_s * 2, _MOST_PATIENCE_S)
                live.changed.set()

    async def _failed(self, live: LivePool, why: str) -> None:
        log.warning("a pool can't be refilled", pool=live.pool.name, error=why)
        if why != live.failure:
            with contextlib.suppress(ForkyError):
                async with self._desk.store.write() as tx:
                    await events.add(tx, "pool.failed", live.pool.id, f"{live.pool.name}: {why}")
        live.failure = why

    async def _step(self, live: LivePool) -> None:
        """One refill, or one look."""
        if live.closed:
            return
        wanted, now = live.wanted, asyncio.get_running_loop().time()
        for _ in range(surplus(live.stock, wanted, live.pool.max, quiet=live.demand.is_quiet(now))):
            if (machine := live.line.take()) is not None:
                await self._leases.dispose(live.pool, machine, "it was more than is wanted")
        is_missing = missing(live.stock, wanted, live.pool.max) > 0
        if is_missing and not self._desk.admission.refills_allowed:
            live.failure = _SHORT
            return
        if live.failure == _SHORT:
            live.failure = ""
        if not is_missing:
            return
        await self._lull(live)
        async with self._turn:
            stock = live.stock  # as it is now that it is our turn
            count = min(missing(stock, live.wanted, live.pool.max), MOST_AT_ONCE)
            if count and not live.closed:
                urgent = bool(stock.waiting or stock.owed)
                live.owed = max(0, live.owed - count)
                live.filling += count
                live.still.clear()
                try:
                    if not await self._desk.journal.carry(self._fill(live, count, urgent=urgent)):
                        # Until what another controller made is seen here; what this one counts settles at once.
                        await asyncio.sleep(_SOON_S if self._desk.store.is_shared else _SETTLED_S)
                finally:
                    live.filling -= count
                    live.still.set()
                live.changed.set()

    async def _fill(self, live: LivePool, count: int, *, urgent: bool) -> bool:
        """Whether anything was made."""
        began, desk = time.perf_counter(), self._desk
        await desk.reconciler.ensure_reachable()
        with desk.journal.flight() as flight:
            ground = await self._ground(live)
            async with desk.store.write() as tx:
                if await snapshots.get(tx, ground.id) is None:
                    raise NotFound(
                        "snapshot", ground.id, f"pool «{live.pool.name}» begins with it; see forky snapshots"
                    )
                count = await self._room(tx, live, count)
                if not count:
                    return False  # another controller was faster
                image = await images.find(tx, ground.image, live.pool.tenant)
                taken = await machines.names(tx, live.pool.tenant, f"{live.pool.name}-")
                rows = [
                    _warm(live.pool, ground, name, image.name if image else "") for name in _names(live, count, taken)
                ]
                await admit(tx, of_machines(ground.shape, count))
                await machines.add(tx, rows)
                await pools.put_in(tx, live.pool.id, [row.id for row in rows])
                intent = await intents.add(tx, IntentKind.FORK, machines=[row.id for row in rows], pool=live.pool.id)
                flight.take(intent)
            try:
                options = ForkOptions(paused=True, background=not urgent)
                result = await desk.host.fork_snapshot(ground.id, rows, options)
                seen = {child.machine.id: child.machine for child in result.children}
                async with desk.store.write() as tx:
                    await machines.save_known(tx, [merge(row, seen[row.id], {ground.id}) for row in rows])
                    await intents.end(tx, intent, IntentStatus.DONE)
            except ForkyError as error:
                if isinstance(error, NotFound) and live.pool.from_image:
                    await self._templates.drop(ground)  # the host has lost it: the next refill makes another
                await desk.undo(flight, error)
                raise
        live.refilled(time.perf_counter() - began)
        log.info("pool refilled", pool=live.pool.name, count=count, urgent=urgent)
        for row in rows:
            live.put(row.id)
        await desk.reconciler.landed(*(row.id for row in rows))
        return True

    async def _room(self, tx: AsyncConnection, live: LivePool, count: int) -> int:
        """How many of `count` the pool is still short of, whoever else fills it: writers take turns."""
        waiting, acquired = await pools.stock(tx, live.pool.id)
        # Machines in hand are among those that wait, or have their lease already.
        stock = replace(live.stock, ready=waiting, filling=0, acquired=max(acquired, live.acquired))
        return min(count, missing(stock, live.wanted, live.pool.max))

    async def _ground(self, live: LivePool) -> Snapshot:
        """What the pool's machines begin as. That of an image is its template, which another QEMU can't load."""
        desk, pool = self._desk, live.pool
        async with desk.store.read() as tx:
            image = await images.find(tx, pool.image, pool.tenant) if pool.from_image else None
            found = await snapshots.get(tx, pool.snapshot) if pool.snapshot and not pool.from_image else None
        if image is not None:
            found = await self._templates.get(image, pool.shape, await desk.host.status())
            if found.id != pool.snapshot:
                async with desk.store.write() as tx:
                    await pools.set_snapshot(tx, pool.id, found.id)
                live.pool = replace(pool, snapshot=found.id)
        if found is None:
            raise NotFound(
                "image" if pool.from_image else "snapshot",
                pool.source,
                f"pool «{pool.name}» can't be refilled without it: remove the pool with forky pool rm {pool.name}",
            )
        return found

    async def empty(self, live: LivePool) -> None:
        """Removes what waits in a pool that is closed, when a refill that is under way has ended."""
        await live.still.wait()
        async with self._desk.store.read() as tx:
            waiting = [m.id for m in await machines.in_pools(tx) if m.pool == live.pool.id]
        removals: list[Coroutine[Any, Any, None]] = [
            self._leases.dispose(live.pool, machine, "the pool is removed") for machine in waiting
        ]
        await asyncio.gather(*removals)


def _names(live: LivePool, count: int, taken: set[str]) -> list[str]:
    """py-3f2a: of the pool, and not to be guessed from the one before."""
    names: set[str] = set()
    while len(names) < count:
        if (name := f"{live.pool.name}-{secrets.token_hex(2 if len(taken) < 10_000 else 4)}") not in taken:
            names.add(name)
    return sorted(names)


def _warm(pool: Pool, ground: Snapshot, name: str, image_name: str) -> Machine:
    return Machine(
        id=new_machine_id(),
        name=name,
        state=MachineState.CREATING,
        image=ground.image,
        image_name=image_name,
        shape=ground.shape,
        snapshot=ground.id,
        parent=ground.machine,
        created_us=now_us(),
        config=pool.config,
        tenant=pool.tenant,
    )
