"""Leases: for how long somebody has a machine of a pool. Use renews them, and what nobody uses is removed.

A machine that is to go for another reason (it broke, the pool shrinks, its caller left) gets a lease that is over: so
there is one way out, and a controller that dies on it leaves a note for the next.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.changes import Changes
from forkypig.controller.desk import Desk, find_machine
from forkypig.controller.principal import acting, for_tenant, principal
from forkypig.controller.store import events, pools
from forkypig.core.pools import check_lease
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, NotFound, NotPossibleNow
from forkypig.model import Lease, MachineId, Pool
from forkypig.model.ids import PoolId
from forkypig.model.pools import DEFAULT_TTL_S

log = structlog.get_logger()

_US = 1_000_000
# A use is written down when the lease has moved by this part of its time to live, or by so many seconds.
_WORTH_SAVING, _WORTH_SAVING_S = 0.25, 30.0


class PoolLeases:
    """All leases."""

    def __init__(self, desk: Desk, changes: Changes) -> None:
        self._desk, self._changes = desk, changes
        self.held: dict[MachineId, Lease] = {}
        self.fresh: set[MachineId] = set()  # since the database was last asked
        self._saved_us: dict[MachineId, int] = {}  # when each ends by the database
        self._using: Counter[MachineId] = Counter()
        self._ending: set[MachineId] = set()

    # -- use -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, machine: str) -> Iterator[None]:
        """For as long as the block lasts the machine's lease does not end; then it begins anew. Fine for others."""
        found = MachineId(machine)
        if found not in self.held:
            yield
            return
        self._using[found] += 1
        try:
            yield
        finally:
            self._using[found] -= 1
            self._using += Counter()  # drops what is zero
            self._moved(found)

    def _moved(self, machine: MachineId) -> None:
        if (lease := self.held.get(machine)) is not None and lease.expires_us:
            self.held[machine] = replace(lease, expires_us=now_us() + round(lease.ttl_s * _US))

    async def renew(self, text: str, ttl_s: float, *, begin: bool) -> Lease:
        """The lease begins anew, with another time to live unless `ttl_s` is 0. `begin`: a machine that was not
        acquired gets one, which is of no pool. Raises NotPossibleNow for such a one without."""
        async with self._desk.store.write() as tx:
            machine = await find_machine(tx, text)
            lease = await pools.lease_of(tx, machine.id)
            if lease is None and not begin:
                raise _not_acquired(machine.name)
            ttl_s = ttl_s or (lease.ttl_s if lease else DEFAULT_TTL_S)
            check_lease(ttl_s, 0, {})
            if lease is None:
                lease = replace(self._new(machine.id, ttl_s), machine_name=machine.name)
                await pools.adding_lease(lease).run(tx)
            else:
                lease = replace(lease, ttl_s=ttl_s, expires_us=now_us() + round(ttl_s * _US))
                await pools.extend(tx, [lease])
        self.took(lease)
        return lease

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def new(self, pool: Pool, machine: MachineId, ttl_s: float, labels: Mapping[str, str]) -> Lease:
        return replace(self._new(machine, ttl_s), pool=pool.id, pool_name=pool.name, labels=labels)

    def _new(self, machine: MachineId, ttl_s: float) -> Lease:
        now, who = now_us(), principal()
        return Lease(
            machine=machine,
            pool=PoolId(""),
            pool_name="",
            tenant=who.tenant,
            holder=who.name,
            ttl_s=ttl_s,
            acquired_us=now,
            expires_us=now + round(ttl_s * _US),
        )

    def took(self, lease: Lease) -> None:
        """A lease has begun, and is in the database."""
        self.held[lease.machine] = lease
        self.fresh.add(lease.machine)
        self._saved_us[lease.machine] = lease.expires_us

    async def release(self, text: str) -> Lease:
        """Ends a machine that was acquired. Raises NotPossibleNow for another."""
        async with self._desk.store.read() as tx:
            machine = await find_machine(tx, text)
            lease = await pools.lease_of(tx, machine.id)
        if lease is None:
            raise _not_acquired(machine.name)
        await self._changes.remove(machine.id)
        self._forget(machine.id)
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
        self.held[over.machine] = over
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
            self._forget(lease.machine)
        finally:
            self._ending.discard(lease.machine)

    def _forget(self, machine: MachineId) -> None:
        self.held.pop(machine, None)
        self._saved_us.pop(machine, None)

    # -- now and then --------------------------------------------------------------------------------------------------

    def refresh(self, rows: list[Lease]) -> None:
        """What the database says; of a lease that is known the later end counts."""
        known = self.held
        self.held = {
            row.machine: row if (old := known.get(row.machine)) is None or old.expires_us <= row.expires_us else old
            for row in rows
        } | {machine: known[machine] for machine in self.fresh & known.keys()}
        self._saved_us = {row.machine: row.expires_us for row in rows}

    async def look(self) -> None:
        """Writes down what was used, and ends what nobody used."""
        for machine in self._using:
            self._moved(machine)
        moved = [lease for machine, lease in self.held.items() if self._is_worth_saving(machine, lease)]
        if moved:
            async with self._desk.store.write() as tx:
                await pools.extend(tx, moved)
            self._saved_us.update({lease.machine: lease.expires_us for lease in moved})
        now = now_us()
        for lease in list(self.held.values()):
            if lease.expires_us <= now and lease.machine not in self._using and lease.machine not in self._ending:
                self._desk.journal.begin(self._expire(lease))

    def _is_worth_saving(self, machine: MachineId, lease: Lease) -> bool:
        moved_s = (lease.expires_us - self._saved_us.get(machine, 0)) / _US
        return moved_s > min(lease.ttl_s * _WORTH_SAVING, _WORTH_SAVING_S)

    async def _expire(self, lease: Lease) -> None:
        if lease.expires_us and lease.machine not in self._ending:
            log.info("lease ended", machine=lease.machine, pool=lease.pool_name, holder=lease.holder)
            async with self._desk.store.write() as tx:
                of = f" of {lease.pool_name}" if lease.pool else ""
                detail = f"{lease.machine_name}{of}, not used for {lease.ttl_s:g} s by {lease.holder}"
                await events.add(tx, "lease.expired", lease.machine, detail)
        await self._end(lease)


def _not_acquired(name: str) -> NotPossibleNow:
    return NotPossibleNow(f"machine «{name}» was not acquired from a pool, so it has no lease: remove it with forky rm")
