"""What becomes of leases: they are renewed, and the machines of those that are over are removed.

A machine that is to go for another reason (it broke, the pool shrinks, its caller left) gets a lease that is over: so
there is one way out, and a controller that dies on it leaves a note for the next.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.changes import Changes
from forkypig.controller.desk import Desk, find_machine
from forkypig.controller.leases import end_us
from forkypig.controller.principal import acting, for_tenant, principal
from forkypig.controller.store import events, pools
from forkypig.core.pools import check_lease
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, NotFound, NotPossibleNow
from forkypig.model import Lease, MachineId, Pool

log = structlog.get_logger()


class PoolLeases:
    """All leases."""

    def __init__(self, desk: Desk, changes: Changes) -> None:
        self._desk, self._changes, self._known = desk, changes, desk.leases
        self._ending: set[MachineId] = set()

    async def renew(self, text: str, ttl_s: float) -> Lease:
        """The lease begins anew, with another time to live unless `ttl_s` is 0. Raises NotPossibleNow for a machine
        without one."""
        async with self._desk.store.write() as tx:
            machine = await find_machine(tx, text)
            if (lease := await pools.lease_of(tx, machine.id)) is None:
                raise _without(machine.name)
            ttl_s = ttl_s or lease.ttl_s
            check_lease(ttl_s, 0, {})
            lease = replace(lease, ttl_s=ttl_s, expires_us=end_us(ttl_s))
            await pools.extend(tx, [lease])
        self._known.took(lease)
        return lease

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def new(self, pool: Pool, machine: MachineId, ttl_s: float, labels: Mapping[str, str]) -> Lease:
        who = principal()
        return Lease(
            machine=machine,
            pool=pool.id,
            pool_name=pool.name,
            tenant=who.tenant,
            holder=who.name,
            labels=labels,
            ttl_s=ttl_s,
            acquired_us=now_us(),
            expires_us=end_us(ttl_s),
        )

    async def release(self, text: str) -> Lease:
        """Ends a machine that has a lease. Raises NotPossibleNow for another."""
        async with self._desk.store.read() as tx:
            machine = await find_machine(tx, text)
            lease = await pools.lease_of(tx, machine.id)
        if lease is None:
            raise _without(machine.name)
        await self._changes.remove(machine.id)
        self._known.forget(machine.id)
        return lease

    async def dispose(self, pool: Pool, machine: MachineId, why: str) -> None:
        """Removes a machine that waits in a pool. Doesn't raise."""
        try:
            async with self._desk.store.write() as tx:
                if not await pools.take_out(tx, pool.id, machine):
                    return  # another controller has given it to somebody
                over = await self.end_at_once(tx, pool, machine, why)
            await self.remove(over)
        except ForkyError as error:
            log.warning("a machine of a pool is not removed yet", machine=machine, error=str(error))
        except Exception:  # the machine's row was gone before its lease: somebody else removes it
            log.exception("a machine of a pool was not disposed of", machine=machine)

    async def end_at_once(self, tx: AsyncConnection, pool: Pool, machine: MachineId, why: str) -> Lease:
        """Writes down of one that has left its pool that it belongs to nobody; `remove` follows, here or by whoever
        reads it."""
        over = replace(self.new(pool, machine, 1.0, {}), tenant=pool.tenant, holder="", expires_us=0)
        await pools.end_lease(tx, over)
        await events.add(tx, "pool.dropped", machine, f"of {pool.name}: {why}", tenant=pool.tenant)
        return over

    async def remove(self, over: Lease) -> None:
        """Removes a machine whose lease is over. Doesn't raise."""
        self._known.held[over.machine] = over
        try:
            await self._end(over)
        except ForkyError as error:
            log.warning("a machine of a pool is not removed yet", machine=over.machine, error=str(error))

    async def _end(self, lease: Lease) -> None:
        if lease.machine in self._ending:
            return
        self._ending.add(lease.machine)
        try:
            with acting(for_tenant(lease.tenant)), contextlib.suppress(NotFound):
                await self._changes.remove(lease.machine)
            self._known.forget(lease.machine)
        finally:
            self._ending.discard(lease.machine)

    async def look(self) -> None:
        """Writes down what was used, and ends what nobody used."""
        if moved := self._known.used():
            async with self._desk.store.write() as tx:
                await pools.extend(tx, moved)
            self._known.saved(moved)
        for lease in self._known.over():
            if lease.machine not in self._ending:
                self._desk.journal.begin(self._expire(lease))

    async def _expire(self, lease: Lease) -> None:
        if lease.expires_us and lease.machine not in self._ending:
            log.info("lease ended", machine=lease.machine, pool=lease.pool_name, holder=lease.holder)
            async with self._desk.store.write() as tx:
                of = f" of {lease.pool_name}" if lease.pool else ""
                detail = f"{lease.machine_name}{of}, not used for {lease.ttl_s:g} s by {lease.holder}"
                await events.add(tx, "lease.expired", lease.machine, detail)
        await self._end(lease)


def _without(name: str) -> NotPossibleNow:
    return NotPossibleNow(
        f"machine «{name}» was not acquired from a pool, nor made with a time to live, so it has no lease: remove it "
        "with forky rm"
    )
