"""Leases: until when machines stay that nobody uses, as far as this controller knows. Use renews them.

A lease that is asked for with a machine stands with the operation that makes it, and begins in the transaction in which
that is done, whoever finishes it: so no machine is left without, whatever is killed. What ends leases is in pools/.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.counted import counted
from forkypig.controller.principal import principal
from forkypig.controller.store import pools
from forkypig.core.intents import Intent
from forkypig.core.pools import check_lease
from forkypig.daemon.server import now_us
from forkypig.model import Lease, Machine, MachineId
from forkypig.model.ids import PoolId

_US = 1_000_000
# A use is written down when the lease has moved by this part of its time to live, or by so many seconds.
_WORTH_SAVING, _WORTH_SAVING_S = 0.25, 30.0


def end_us(ttl_s: float) -> int:
    """When a lease is over that is used now for the last time."""
    return now_us() + round(ttl_s * _US)


def check_ttl(ttl_s: float) -> None:
    """0 is no lease. Raises InvalidRequest."""
    if ttl_s:
        check_lease(ttl_s, 0, {})


def wished(ttl_s: float) -> dict[str, Any]:
    """What an operation says of the leases of the machines that it makes; nothing where they are to have none."""
    return {"ttl_s": ttl_s, "holder": principal().name} if ttl_s else {}


async def begin(tx: AsyncConnection, intent: Intent, made: Iterable[Machine]) -> list[Lease]:
    """Writes down the leases of what an operation has made, as it wished; to be told to `Leases.began` thereafter."""
    if not (ttl_s := intent.arguments.get("ttl_s", 0.0)):
        return []
    now, ends = now_us(), end_us(ttl_s)
    begun = [
        Lease(
            machine=machine.id,
            machine_name=machine.name,
            pool=PoolId(""),
            pool_name="",
            tenant=intent.tenant,
            holder=intent.arguments["holder"],
            ttl_s=ttl_s,
            acquired_us=now,
            expires_us=ends,
        )
        for machine in made
    ]
    for lease in begun:
        await pools.adding_lease(lease).run(tx)
    return begun


class Leases:
    """All that are known, and who uses their machines."""

    def __init__(self) -> None:
        self.held: dict[MachineId, Lease] = {}
        self.fresh: set[MachineId] = set()  # since the database was last asked
        self.to_look = asyncio.Event()  # there may be leases to look after, where there were none
        self._saved_us: dict[MachineId, int] = {}  # when each ends by the database
        self._using: Counter[MachineId] = Counter()

    def expires_us(self, machine: MachineId) -> int:
        """When it is removed unless it is used; 0: it has no lease."""
        return lease.expires_us if (lease := self.held.get(machine)) is not None else 0

    # -- use -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, machine: str) -> Iterator[None]:
        """For as long as the block lasts the machine's lease does not end; then it begins anew. Fine for one without,
        and for one whose lease another controller has just written, which is known here within a second."""
        found = MachineId(machine)
        try:
            with counted(self._using, found):
                yield
        finally:
            self._moved(found)

    def _moved(self, machine: MachineId) -> None:
        if (lease := self.held.get(machine)) is not None and lease.expires_us:
            self.held[machine] = replace(lease, expires_us=end_us(lease.ttl_s))

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def took(self, lease: Lease) -> None:
        """A lease has begun, or begun anew, and is in the database."""
        self.held[lease.machine] = lease
        self.fresh.add(lease.machine)
        self._saved_us[lease.machine] = lease.expires_us

    def began(self, begun: Sequence[Lease]) -> None:
        """As `took`; without pools nobody may have looked so far."""
        for lease in begun:
            self.took(lease)
        if begun:
            self.to_look.set()

    def forget(self, machine: MachineId) -> None:
        """The machine is gone."""
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

    def used(self) -> list[Lease]:
        """Those that have moved by so much that it is to be written down, which `saved` is then told."""
        for machine in self._using:
            self._moved(machine)
        return [lease for machine, lease in self.held.items() if self._is_worth_saving(machine, lease)]

    def _is_worth_saving(self, machine: MachineId, lease: Lease) -> bool:
        moved_s = (lease.expires_us - self._saved_us.get(machine, 0)) / _US
        return moved_s > min(lease.ttl_s * _WORTH_SAVING, _WORTH_SAVING_S)

    def saved(self, moved: Sequence[Lease]) -> None:
        self._saved_us.update({lease.machine: lease.expires_us for lease in moved})

    def over(self) -> list[Lease]:
        """Those that nobody has used for their time to live."""
        now = now_us()
        return [lease for lease in self.held.values() if lease.expires_us <= now and lease.machine not in self._using]
