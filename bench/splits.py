"""Splits of a machine, one after another, with what each cost: the pause, its parts, the stall seen from outside."""

import asyncio
import time
from dataclasses import dataclass, field

from bench.console import ConsoleWatch
from bench.hostlog import saved_ms
from bench.session import Session
from forkypig.errors import DeadlineExceeded
from forkypig.sdk.machine import Machine

# After the successor runs, its first milliseconds are slow (translation, page faults): they belong to the stall.
_AFTER_S = 0.25
_PASS_S = 60.0


@dataclass(slots=True)
class Splits:
    """One entry per split, all in ms. `calm_ms` is the largest gap in as long a time before it."""

    pause_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    calm_ms: list[float] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)


async def split_often(machine: Machine, count: int, watch: ConsoleWatch | None = None, *, passes: int = 0) -> Splits:
    """Takes `count` snapshots; before each the rewriter goes at least `passes` times through all of its memory."""
    splits = Splits()
    for _ in range(count):
        if watch is not None and passes:
            await _rewritten(watch, passes)
        await asyncio.sleep(_AFTER_S)
        began = time.perf_counter()
        snapshot = await machine.snapshot()
        returned = time.perf_counter()
        splits.pause_ms.append(snapshot.pause_ms)
        splits.call_ms.append((returned - began) * 1000)
        splits.snapshots.append(snapshot.id)
        if watch is not None:
            await asyncio.sleep(_AFTER_S)
            ended = time.perf_counter()
            splits.stall_ms.append(await watch.largest_gap_ms(began, ended))
            splits.calm_ms.append(await watch.largest_gap_ms(began - _AFTER_S, began))
    return splits


async def _rewritten(watch: ConsoleWatch, passes: int) -> None:
    """Waits for whole passes that begin from now on; the one under way does not count."""
    wanted = watch.passes + 1 + passes
    deadline = time.monotonic() + _PASS_S
    while watch.passes < wanted:
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the guest's rewriter makes no passes: look at /root/rewriter.err in the machine")
        await asyncio.sleep(0.005)


def record(session: Session, section: str, splits: Splits, **labels: str | int) -> None:
    """Puts the samples into the results."""
    results = session.results
    session.tell(results.add(section, "pause", "ms", splits.pause_ms, **labels))
    results.add(section, "snapshot call", "ms", splits.call_ms, **labels)
    if splits.stall_ms:
        session.tell(results.add(section, "stall", "ms", splits.stall_ms, **labels))
        results.add(section, "largest gap without a fork", "ms", splits.calm_ms, **labels)
    saved = saved_ms(session.home / "logs/hostd.log", set(splits.snapshots))
    if saved:
        results.add(section, "stop and save", "ms", saved.values(), **labels)
        pauses = dict(zip(splits.snapshots, splits.pause_ms, strict=True))
        results.add(section, "freeze and load", "ms", [pauses[name] - part for name, part in saved.items()], **labels)
