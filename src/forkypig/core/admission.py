"""Whether the host has memory for more: by what is left of it, as measured, not by the sum of machines' sizes. Pure.

A child shares its parent's memory and takes what it writes; what that will be nobody knows. So a new machine is
reckoned at a fraction of its size (the overcommit), what was admitted a moment ago and is not in the measured figures
yet is reckoned too, and when memory gets tight nevertheless, refills stop first, then new machines, then idle ones
hibernate.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from forkypig.errors import ResourceExhausted
from forkypig.model import Shape

# An idle child among ten costs 32 MiB (bench/results); one that boots touches what its kernel and services need.
CHILD_MIB = 32
BOOT_MIB = 192
# Kept free: what the host's own programs may ask for while we look away.
_RESERVE_MIB = 256
_RESERVE_SHARE = 32
# Of PSI's avg10. Some stalling is reclaim at work; when everything stands still for memory, it is late.
_TIGHT_SOME_PERCENT = 10.0
_PRESSED_FULL_PERCENT = 5.0
# An idle guest's timers take some, under TCG more.
BUSY_CORES = 0.05


class Level(Enum):
    """How tight memory is."""

    CALM = "calm"
    TIGHT = "tight"  # nothing is made ahead
    PRESSED = "pressed"  # nothing new is made


@dataclass(frozen=True, slots=True)
class HostMemory:
    """As measured. `available_mib` 0: not known, then nothing is refused."""

    total_mib: int = 0
    available_mib: int = 0
    some_percent: float = 0.0
    full_percent: float = 0.0

    @property
    def reserve_mib(self) -> int:
        return max(_RESERVE_MIB, self.total_mib // _RESERVE_SHARE)


def level(memory: HostMemory) -> Level:
    if not memory.available_mib:
        return Level.CALM
    if memory.available_mib < memory.reserve_mib or memory.full_percent >= _PRESSED_FULL_PERCENT:
        return Level.PRESSED
    if memory.available_mib < 2 * memory.reserve_mib or memory.some_percent >= _TIGHT_SOME_PERCENT:
        return Level.TIGHT
    return Level.CALM


def reckoned_mib(shape: Shape, count: int, overcommit: float, *, boots: bool = False) -> int:
    """What `count` new machines are taken to need."""
    least = min(shape.memory_mib, BOOT_MIB if boots else CHILD_MIB)
    return count * max(least, round(shape.memory_mib / overcommit))


def check_admission(memory: HostMemory, promised_mib: int, needed_mib: int) -> None:
    """Raises ResourceExhausted where the host has no room. `promised_mib`: admitted, and not measured yet."""
    if not memory.available_mib:
        return
    if level(memory) is Level.PRESSED:
        raise ResourceExhausted(
            f"the host is short of memory ({memory.available_mib} MiB of {memory.total_mib} are left, and everything "
            f"waited for memory {memory.full_percent:.0f} % of the time): hibernate or remove machines, or try later"
        )
    room = memory.available_mib - memory.reserve_mib - promised_mib
    if needed_mib > room:
        raise ResourceExhausted(
            f"the host has room for {max(room, 0)} MiB more ({memory.reserve_mib} MiB are kept free) and this is "
            f"reckoned to need {needed_mib}: make fewer or smaller machines, hibernate or remove some, or raise "
            "FORKY_OVERCOMMIT"
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """A machine's use of CPU: how much so far, when that was read, and since when it has been idle."""

    cpu_s: float
    at_s: float
    idle_since_s: float


def look(before: Mapping[str, Seen], cpu_s: Mapping[str, float], now_s: float) -> dict[str, Seen]:
    """What is known of machines after reading how much CPU they have used. One that is new counts as busy till now."""
    found = {}
    for machine, used in cpu_s.items():
        was = before.get(machine)
        if was is None or now_s <= was.at_s:
            idle_since = now_s if was is None else was.idle_since_s
        else:
            idle = 0 <= (used - was.cpu_s) / (now_s - was.at_s) < BUSY_CORES
            idle_since = was.idle_since_s if idle else now_s
        found[machine] = Seen(used, now_s, idle_since)
    return found


def idle_longest(seen: Mapping[str, Seen], candidates: Iterable[str], now_s: float, idle_s: float) -> list[str]:
    """Those of `candidates` that have been idle for `idle_s`, the one that has been so for longest first."""
    idle = [m for m in candidates if m in seen and now_s - seen[m].idle_since_s >= idle_s]
    return sorted(idle, key=lambda machine: seen[machine].idle_since_s)
