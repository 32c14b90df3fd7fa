"""What machines use: CPU time and memory of their QEMU processes, read from /proc when somebody asks.

CPU time costs microseconds. Memory does not: for smaps_rollup the kernel walks all of a process's page tables, under
the lock that its mmap calls need (9 ms for a child with 75 MiB, measured on two shared cores under load). So it is read
every two seconds at most, so seldom that it takes a twentieth of a core, never of a machine with an operation under way
(a split must not wait for it), and of as many machines a time as fit into a quarter of a second, those first that have
waited longest. Whoever was never read is read at once, for up to a second.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from forkypig.daemon.server import now_us
from forkypig.model import MachineId

_EVERY_S = 2.0
_REST = 20  # times as long as readings took is rested after them
_ROUND_S = 0.25
_FIRST_ROUND_S = 1.0
# The kernel may hold a process's lock for as long as one of its page faults waits for the pager.
_ANSWER_S = 2.0
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process, in bytes, by the kernel's counts: proc(5), smaps_rollup."""

    resident: int = 0
    proportional: int = 0
    private: int = 0
    shared: int = 0
    time_us: int = 0  # when it was read; 0: not yet


@dataclass(frozen=True, slots=True)
class Use:
    """Of a machine."""

    cpu_us: int
    cpu_time_us: int  # when that was read
    memory: Memory


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to look at."""

    machine: MachineId
    pid: int
    is_busy: bool  # an operation is under way


@dataclass(slots=True)
class _Seen:
    pid: int
    memory: Memory = Memory()
    read_at: float = 0.0  # monotonic, the memory; 0: never
    use: Use | None = None


@dataclass(slots=True)
class Meter:
    """Reads on a thread of its own; what was read before is the answer where that has to wait."""

    proc: Path = Path("/proc")
    _seen: dict[MachineId, _Seen] = field(default_factory=dict)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "usage"))
    _reading: asyncio.Future[None] | None = None
    _next_round: float = 0.0  # monotonic

    async def read(self, targets: Iterable[Target]) -> dict[MachineId, Use]:
        """Of each machine whose process is there."""
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._thread, self._read, list(targets))
        await asyncio.wait({self._reading}, timeout=_ANSWER_S)
        if self._reading.done():
            self._reading.result()
        return {machine: seen.use for machine, seen in list(self._seen.items()) if seen.use is not None}

    def close(self) -> None:
        """Waits for nothing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, targets: list[Target]) -> None:
        seen = {target.machine: self._known(target) for target in targets if (self.proc / str(target.pid)).exists()}
        self._read_memories(
            [seen[target.machine] for target in targets if target.machine in seen and not target.is_busy]
        )
        for one in seen.values():
            cpu_us = self._cpu_us(one.pid)
            one.use = Use(cpu_us, now_us(), one.memory) if cpu_us is not None else None
        self._seen = seen

    def _known(self, target: Target) -> _Seen:
        """What is known of this very process: after a fork a machine has another."""
        known = self._seen.get(target.machine)
        return known if known is not None and known.pid == target.pid else _Seen(target.pid)

    def _read_memories(self, processes: list[_Seen]) -> None:
        began = time.monotonic()
        rests = began < self._next_round
        for one in sorted(processes, key=lambda one: one.read_at):
            spent = time.monotonic() - began
            if spent > _FIRST_ROUND_S or (one.read_at and (rests or spent > _ROUND_S)):
                break  # the others have been read since
            with contextlib.suppress(OSError):  # it has ended meanwhile
                one.memory = parse_rollup((self.proc / str(one.pid) / "smaps_rollup").read_text())
            one.read_at = time.monotonic()
        now = time.monotonic()
        if not rests:
            self._next_round = now + max(_EVERY_S, _REST * (now - began))

    def _cpu_us(self, pid: int) -> int | None:
        try:
            stat = (self.proc / str(pid) / "stat").read_text()
        except OSError:
            return None
        # The name may hold blanks and brackets: fields are counted from the last bracket on. proc(5): 14 and 15.
        rest = stat[stat.rindex(")") + 2 :].split()
        return (int(rest[11]) + int(rest[12])) * _TICK_US


def parse_rollup(text: str) -> Memory:
    """The contents of smaps_rollup."""
    kib: dict[str, int] = {}
    for line in text.splitlines()[1:]:
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            kib[name] = int(value.split()[0])
    return Memory(
        resident=kib.get("Rss", 0) << 10,
        proportional=kib.get("Pss", 0) << 10,
        private=(kib.get("Private_Clean", 0) + kib.get("Private_Dirty", 0)) << 10,
        shared=(kib.get("Shared_Clean", 0) + kib.get("Shared_Dirty", 0)) << 10,
        time_us=now_us(),
    )
