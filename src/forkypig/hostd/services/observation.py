"""forkypig.v1.HostObservation: what this host's machines use, and what its pager has measured."""

import asyncio
import contextlib
import time
from typing import Any

import grpc

from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError
from forkypig.hostd import pressure
from forkypig.hostd.host import Host
from forkypig.hostd.usage import Meter, Target, Use
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from forkypig.v1 import observe_pb2_grpc
from forkypig.wire.edge import answered

_Context = grpc.aio.ServicerContext[Any, Any]
# The pager asks the kernel about each of its files for these.
_TIERS_EVERY_S = 5.0


class HostObservationServicer(observe_pb2_grpc.HostObservationServicer):
    """See observe.proto."""

    def __init__(self, host: Host) -> None:
        self._host, self._meter = host, Meter()
        self._tiers = common.MemoryTiers()
        self._tiers_due = 0.0

    @answered
    async def GetUsage(self, request: common.Empty, context: _Context) -> pb.HostUsage:
        answer = pb.HostUsage(time_us=now_us())
        targets = [
            Target(live.id, live.process.pid, bool(live.view().operation))
            for live in self._host.machines.values()
            if live.process is not None
        ]
        for machine, use in (await self._meter.read(targets)).items():
            answer.machines.append(_to_wire(machine, use))
        memory = await asyncio.to_thread(pressure.measure, self._host.memory_groups)
        answer.memory_total_bytes = memory.total_mib << 20
        answer.memory_available_bytes = memory.available_mib << 20
        with contextlib.suppress(ForkyError):  # `forky status` says it; here the fields are absent
            await self._ask_pager(answer)
        return answer

    async def _ask_pager(self, answer: pb.HostUsage) -> None:
        faults = await self._host.pager.faults()
        answer.faults.CopyFrom(faults.latency)
        answer.fault_bytes = faults.bytes
        if time.monotonic() >= self._tiers_due:
            pager = await self._host.pager.status()
            frozen = (each.own_bytes for each in pager.snapshots if each.state == each.STATE_FROZEN)
            self._tiers = common.MemoryTiers(
                frozen_bytes=sum(frozen),
                cached_bytes=pager.cached_bytes,
                stored_bytes=pager.stored_bytes,
                chunks=pager.chunks,
            )
            self._tiers_due = time.monotonic() + _TIERS_EVERY_S
        answer.tiers.CopyFrom(self._tiers)


def _to_wire(machine: str, use: Use) -> pb.MachineUsage:
    return pb.MachineUsage(
        machine=machine,
        cpu_us=use.cpu_us,
        cpu_time_us=use.cpu_time_us,
        resident_bytes=use.memory.resident,
        proportional_bytes=use.memory.proportional,
        private_bytes=use.memory.private,
        shared_bytes=use.memory.shared,
        memory_time_us=use.memory.time_us,
    )
