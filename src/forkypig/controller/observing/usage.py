"""Every machine with what it uses: the controller's list and the host's measurements, together."""

import asyncio
import time

from forkypig.controller.desk import Desk
from forkypig.controller.store import machines, pools
from forkypig.errors import ForkyError
from forkypig.v1 import observe_pb2 as pb
from forkypig.wire import convert

# Whoever asks more often, or beside others, gets the same answer.
_FRESH_S = 0.5
# hostd answers within 2 s with what it knows; `forky top` and a scrape wait no longer than they must.
_HOST_S = 8.0


class Usage:
    """GetUsage."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._turn = asyncio.Lock()
        self._answer = pb.GetUsageResponse()
        self._read_at = float("-inf")

    async def read(self) -> pb.GetUsageResponse:
        """Not to be changed: others have the same one. Answers also when hostd does not."""
        async with self._turn:
            if time.monotonic() >= self._read_at + _FRESH_S:
                self._answer = await self._ask()
                self._read_at = time.monotonic()
            return self._answer

    async def _ask(self) -> pb.GetUsageResponse:
        measured = self._desk.host.measured
        answer = pb.GetUsageResponse()
        answer.pause_p50_ms, answer.pause_p99_ms, answer.pauses = measured.pause_quantiles_ms()
        use: dict[str, pb.MachineUsage] = {}
        try:
            host = await self._desk.host.usage(timeout_s=_HOST_S)
            use = {each.machine: each for each in host.machines}
            answer.host.CopyFrom(host)
            answer.host.ClearField("machines")
        except ForkyError as error:
            answer.host_error = str(error)
        async with self._desk.store.read() as tx:
            every = await machines.every(tx)
            names = {pool.id: pool.name for pool in await pools.every(tx)}
            leased = {lease.machine: lease.pool_name for lease in await pools.leases(tx)}
        measured.keep_only({machine.id for machine in every})
        operations = self._desk.journal.operations()
        for machine in every:
            row = answer.machines.add(last_pause_ms=measured.last_pause_ms(machine.id))
            row.machine.CopyFrom(convert.machine_to_wire(machine))
            row.pool = names.get(machine.pool, "") if machine.pool else leased.get(machine.id, "")
            row.machine.operation = operations.get(machine.id, "")
            if machine.id in use:
                row.usage.CopyFrom(use[machine.id])
        return answer
