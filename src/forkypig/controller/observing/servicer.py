"""forkypig.v1.Observation: events as they happen, what machines use, metrics."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from forkypig.controller.following import follow
from forkypig.controller.observing.metrics import Metrics
from forkypig.controller.observing.usage import Usage
from forkypig.controller.principal import principal
from forkypig.controller.store import Store
from forkypig.errors import InvalidRequest
from forkypig.model.access import Principal
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from forkypig.v1 import observe_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.edge import answered, streamed

_Context = grpc.aio.ServicerContext[Any, Any]
_LARGEST_SEQUENCE = (1 << 63) - 1  # of the database's integers
_MOST_KINDS = 100


class ObservationServicer(observe_pb2_grpc.ObservationServicer):
    """See observe.proto."""

    def __init__(self, store: Store, usage: Usage, metrics: Metrics) -> None:
        self._store, self._usage, self._metrics = store, usage, metrics

    @streamed
    async def FollowEvents(self, request: pb.FollowEventsRequest, context: _Context) -> AsyncIterator[common.Event]:
        if request.after_sequence > _LARGEST_SEQUENCE or request.since_us < 0 or len(request.kinds) > _MOST_KINDS:
            raise InvalidRequest("events can't be followed from there: use the sequence number of an event, or 0")
        found = follow(
            self._store,
            principal().tenant,
            request.after_sequence,
            since_us=request.since_us,
            kinds=tuple(request.kinds),
            follow=request.follow,
        )
        async with aclosing(found):
            async for event in found:
                yield convert.event_to_wire(event)

    @answered
    async def GetUsage(self, request: common.Empty, context: _Context) -> pb.GetUsageResponse:
        return seen_by(principal(), await self._usage.read())

    @answered
    async def GetMetrics(self, request: common.Empty, context: _Context) -> pb.GetMetricsResponse:
        return pb.GetMetricsResponse(text=await self._metrics.text())


def seen_by(who: Principal, usage: pb.GetUsageResponse) -> pb.GetUsageResponse:
    """Their tenant's part; what is of the whole host is the operator's."""
    seen = pb.GetUsageResponse(host_error=usage.host_error)
    if who.operator:
        seen.CopyFrom(usage)
        del seen.machines[:]
    seen.machines.extend(row for row in usage.machines if row.machine.tenant == who.tenant)
    return seen
