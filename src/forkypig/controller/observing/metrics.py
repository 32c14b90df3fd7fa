"""Prometheus metrics: the controller's own, and what is asked of hostd and the pager at each scrape.

Names and units follow https://prometheus.io/docs/practices/naming. A machine's series end with the machine. No label
takes more values than there are machines, and of these only the first thousand, those with the most memory, have series
of their own; forky_machines_without_series says how many are left out.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from forkypig.controller.observing.usage import Usage
from forkypig.daemon.server import VERSION
from forkypig.model import MachineState
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import observe_pb2 as pb
from forkypig.wire import convert

MOST_MACHINES = 1000
_SCRAPE_S = 10.0  # Prometheus's own default
_LABELS = ("machine", "name", "tenant")


class Metrics(Collector):
    """What is known at the moment of a scrape. `collect` runs on threads that wait for the loop."""

    def __init__(self, usage: Usage, registry: CollectorRegistry) -> None:
        self._usage, self._registry = usage, registry
        self._loop = asyncio.get_running_loop()
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the host."""
        return iter(())

    async def text(self) -> str:
        """Everything, in Prometheus's text format."""
        return (await asyncio.to_thread(generate_latest, self._registry)).decode()

    def collect(self) -> Iterator[Metric]:
        """Everything but the controller's own. Not on the loop's thread."""
        answer = asyncio.run_coroutine_threadsafe(self._usage.read(), self._loop).result(_SCRAPE_S)
        yield InfoMetricFamily("forky_build", "What this is.", {"version": VERSION})
        yield GaugeMetricFamily("forky_host_up", "Whether hostd can be reached.", 0 if answer.host_error else 1)
        yield _machines(answer)
        yield from _of_each_machine(answer)
        if not answer.host_error:
            yield from _of_host(answer.host)


def _machines(answer: pb.GetUsageResponse) -> Metric:
    counts = Counter(convert.machine_from_wire(row.machine).state for row in answer.machines)
    family = GaugeMetricFamily("forky_machines", "Machines by state.", labels=("state",))
    for state in MachineState:
        family.add_metric((state.value,), counts[state])
    return family


def _of_each_machine(answer: pb.GetUsageResponse) -> Iterator[Metric]:
    measured = [row for row in answer.machines if row.HasField("usage")]
    measured.sort(key=lambda row: row.usage.proportional_bytes, reverse=True)
    cpu = CounterMetricFamily("forky_machine_cpu_seconds", "CPU time of a machine's QEMU.", labels=_LABELS)
    of_memory = {
        "resident": ("Memory of a machine's QEMU, shared and its own.", "resident_bytes"),
        "proportional": ("The same, shared memory by its share (PSS).", "proportional_bytes"),
        "private": ("Memory that only this machine's QEMU has.", "private_bytes"),
        "shared": ("Memory that other processes have too.", "shared_bytes"),
    }
    memory = {
        name: GaugeMetricFamily(f"forky_machine_memory_{name}_bytes", text, labels=_LABELS)
        for name, (text, _) in of_memory.items()
    }
    for row in measured[:MOST_MACHINES]:
        labels = row.machine.id, row.machine.name, row.machine.tenant
        cpu.add_metric(labels, row.usage.cpu_us / 1e6)
        if row.usage.memory_time_us:
            for name, (_, field) in of_memory.items():
                memory[name].add_metric(labels, getattr(row.usage, field))
    yield cpu
    yield from memory.values()
    yield GaugeMetricFamily(
        "forky_machines_without_series",
        f"Machines beyond the first {MOST_MACHINES}, which have no series of their own.",
        max(0, len(measured) - MOST_MACHINES),
    )


def _of_host(host: pb.HostUsage) -> Iterator[Metric]:
    yield GaugeMetricFamily("forky_host_memory_total_bytes", "Of the host.", host.memory_total_bytes)
    yield GaugeMetricFamily(
        "forky_host_memory_available_bytes", "Of the host, for new processes.", host.memory_available_bytes
    )
    if not host.HasField("faults"):
        return
    family = GaugeMetricFamily(
        "forky_snapshot_memory_bytes",
        "Memory of snapshots by where it is: in frozen processes, in the page cache, in packs on disk (compressed).",
        labels=("tier",),
    )
    family.add_metric(("frozen",), host.tiers.frozen_bytes)
    family.add_metric(("cached",), host.tiers.cached_bytes)
    family.add_metric(("stored",), host.tiers.stored_bytes)
    yield family
    yield _histogram(
        "forky_pager_fault_seconds", "How long the pager took for a read of a snapshot's file.", host.faults
    )
    yield CounterMetricFamily("forky_pager_read_bytes", "What the pager has served.", host.fault_bytes)


def _histogram(name: str, text: str, found: common.Distribution) -> Metric:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*map(str, found.bounds_s), "+Inf"), found.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.sum_s)
