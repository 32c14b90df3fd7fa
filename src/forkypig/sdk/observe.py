"""What goes on: events as they happen and what machines use. What `Forky` has of it, in a class of its own that it
inherits from."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from forkypig import errors, model
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import QUICK_S, translated
from forkypig.sdk.connection import calls as connection_calls
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from forkypig.v1 import observe_pb2_grpc
from forkypig.wire import convert

if TYPE_CHECKING:
    from forkypig.v1.observe_pb2_grpc import ObservationAsyncStub

_AGAIN_S = 0.25


@dataclass(frozen=True, slots=True)
class MachineUse:
    """A machine, and what its QEMU uses. Memory is by the kernel's counts, None where it was not read yet; all is None
    for a machine that has no process."""

    machine: model.Machine
    pool: str  # "": none
    last_pause_ms: float | None  # of its last split since the controller started
    cpu_s: float | None  # since its QEMU started, all threads
    cpu_time_us: int  # when that was read
    resident_bytes: int | None
    proportional_bytes: int | None  # PSS: what is shared counts by its share
    private_bytes: int | None  # nobody else has it
    shared_bytes: int | None  # other processes have it too


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance uses at one moment."""

    machines: tuple[MachineUse, ...]
    pauses: int  # how many splits the quantiles are of: the newest since the controller started
    pause_p50_ms: float
    pause_p99_ms: float
    memory_total_bytes: int  # of the host; 0: not known
    memory_available_bytes: int
    host_error: str  # why nothing was measured; "": it was


class Observing:
    """Events and usage."""

    socket: Endpoint

    @property
    def channel(self) -> grpc.aio.Channel:
        raise NotImplementedError

    @property
    def _observation(self) -> "ObservationAsyncStub":
        return observe_pb2_grpc.ObservationStub(self.channel)

    async def follow_events(
        self,
        *,
        after_sequence: int = 0,
        since_us: int = 0,
        kinds: Sequence[str] = (),
        follow: bool = True,
        patience_s: float = 60.0,
    ) -> AsyncIterator[model.Event]:
        """What happened, oldest first, and with `follow` what happens, for ever; none is left out and none comes twice.

        `since_us`: from this time on (µs since the epoch). `kinds`: only these; "machine" is every "machine.…".
        When the controller goes away the stream goes on where it was as soon as it is back. Raises HostUnreachable when
        that takes longer than `patience_s`, or when it was not there to begin with."""
        loop = asyncio.get_running_loop()
        connected, lost_at = False, 0.0
        while True:
            request = pb.FollowEventsRequest(
                after_sequence=after_sequence, since_us=since_us, kinds=kinds, follow=follow
            )
            try:
                async for event in translated(self.socket, self._observation.FollowEvents(request)):
                    connected, lost_at = True, 0.0
                    after_sequence = event.sequence
                    yield convert.event_from_wire(event)
                if not follow:
                    return
            except errors.HostUnreachable:
                lost_at = lost_at or loop.time()
                if not (connected or follow) or loop.time() > lost_at + patience_s:
                    raise
            await asyncio.sleep(_AGAIN_S)

    async def usage(self) -> Usage:
        """What every machine uses now. CPU time is read at each call, memory every few seconds."""
        with connection_calls(self.socket):
            found = await self._observation.GetUsage(common.Empty(), timeout=QUICK_S)
        return Usage(
            machines=tuple(_use(row) for row in found.machines),
            pauses=found.pauses,
            pause_p50_ms=found.pause_p50_ms,
            pause_p99_ms=found.pause_p99_ms,
            memory_total_bytes=found.host.memory_total_bytes,
            memory_available_bytes=found.host.memory_available_bytes,
            host_error=found.host_error,
        )

    async def metrics(self) -> str:
        """All metrics in Prometheus's text format."""
        with connection_calls(self.socket):
            return (await self._observation.GetMetrics(common.Empty(), timeout=QUICK_S)).text


def _use(row: pb.MachineUsageRow) -> MachineUse:
    use = row.usage if row.HasField("usage") else None
    memory = use if use is not None and use.memory_time_us else None
    return MachineUse(
        machine=convert.machine_from_wire(row.machine),
        pool=row.pool,
        last_pause_ms=row.last_pause_ms or None,
        cpu_s=use.cpu_us / 1e6 if use is not None else None,
        cpu_time_us=use.cpu_time_us if use is not None else 0,
        resident_bytes=memory.resident_bytes if memory is not None else None,
        proportional_bytes=memory.proportional_bytes if memory is not None else None,
        private_bytes=memory.private_bytes if memory is not None else None,
        shared_bytes=memory.shared_bytes if memory is not None else None,
    )
