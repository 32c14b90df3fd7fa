"""Observation and HostObservation for the fakes: events from a list, usage that a test has set."""

# gRPC names a servicer's methods as the .proto does.
# ruff: noqa: N802

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from forkypig.core.following import is_wanted
from forkypig.errors import ForkyError
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from forkypig.v1 import observe_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.status import abort


class Observation(observe_pb2_grpc.ObservationServicer):
    """Of a fake controller, whose `events` it reads."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self.usage = pb.GetUsageResponse()

    async def FollowEvents(self, request: pb.FollowEventsRequest, context: Any) -> AsyncIterator[common.Event]:
        told = 0
        while told < len(self._controller.events) or request.follow:
            for event in self._controller.events[told:]:
                told += 1
                late = event.sequence > request.after_sequence and event.time_us >= request.since_us
                if late and is_wanted(event.kind, request.kinds):
                    yield convert.event_to_wire(event)
            await asyncio.sleep(0.01)

    async def GetUsage(self, request: Any, context: Any) -> pb.GetUsageResponse:
        for row in self.usage.machines:  # each second of the clock half a second of a core
            if row.HasField("usage"):
                row.usage.cpu_us += 500_000
                row.usage.cpu_time_us += 1_000_000
        return self.usage

    async def GetMetrics(self, request: Any, context: Any) -> pb.GetMetricsResponse:
        return pb.GetMetricsResponse(text="forky_machines 1.0\n")


class HostObservation(observe_pb2_grpc.HostObservationServicer):
    """Of a fake host: each of its machines uses the same."""

    def __init__(self, host: Any) -> None:
        self._host = host

    async def GetUsage(self, request: Any, context: Any) -> pb.HostUsage:
        try:
            await self._host._enter("GetUsage", request)
        except ForkyError as error:
            await abort(context, error)
        answer = pb.HostUsage(
            time_us=1,
            memory_total_bytes=16 << 30,
            memory_available_bytes=8 << 30,
            tiers=common.MemoryTiers(frozen_bytes=1, cached_bytes=2, stored_bytes=3),
            faults=common.Distribution(bounds_s=[0.001, 0.01], counts=[5, 3, 2], sum_s=0.5),
            fault_bytes=4096 * 10,
        )
        for number, machine in enumerate(self._host.machines, 1):
            answer.machines.add(
                machine=machine,
                cpu_us=number * 1_500_000,
                cpu_time_us=1,
                resident_bytes=300,
                proportional_bytes=200 + number,
                private_bytes=100,
                shared_bytes=200,
                memory_time_us=1,
            )
        return answer
