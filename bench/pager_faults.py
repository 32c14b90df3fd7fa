#!/usr/bin/env python3
"""Micro-benchmarks of the pager: first-touch faults, sequential reading, bind, packing. Medians; needs FUSE, and root.

    .venv/bin/python bench/pager_faults.py [--json]

Run it on an idle host. Times are those of a client: fault latency is of a random first touch through a private mapping
of the snapshot of a frozen process; bind is the whole call as hostd makes it, inside a machine's pause.
"""

import argparse
import asyncio
import json
import mmap
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forkypig.model import SnapshotId, new_snapshot_id
from forkypig.pager import mount
from tests.component.pager_rig import PAGE, GuestProcess, Rig, drop_cache, running_pager

MIB = 1 << 20


def first_touches(path: Path, size_bytes: int, touches: int) -> list[float]:
    """Latency of random first touches, in µs, of pages that no read-ahead has brought."""
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    blocks = random.Random(1).sample(range(size_bytes // MIB * 4), touches)  # 256 KiB apart at least
    taken = []
    for block in blocks:
        began = time.perf_counter()
        _ = memory[block * (MIB // 4)]
        taken.append((time.perf_counter() - began) * 1e6)
    memory.close()
    return taken


def sequential(path: Path, size_bytes: int) -> float:
    """GB/s of reading all of a mapping, a byte of each page."""
    fd = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
    began = time.perf_counter()
    memory[::PAGE]  # type: ignore[call-overload]
    taken = time.perf_counter() - began
    memory.close()
    return size_bytes / taken / 1e9


async def timed_bind(
    rig: Rig, guest: GuestProcess, parent: SnapshotId | None, size_bytes: int
) -> tuple[SnapshotId, float]:
    """A split; returns the time of Bind in ms."""
    snapshot = new_snapshot_id()
    await rig.client.reserve(snapshot, size_bytes, parent, guest.pid, guest.address)
    guest.freeze()
    began = time.perf_counter()
    await rig.client.bind(snapshot)
    return snapshot, (time.perf_counter() - began) * 1000


async def bind_and_complete(size_mib: int, dirty_mib: int, times: int) -> tuple[list[float], list[float]]:
    """Times of Bind in ms, and of the first read after it, for machines that stand on a snapshot."""
    binds, reads = [], []
    async with running_pager() as rig:
        root = await asyncio.to_thread(rig.guest, None, size_mib * MIB)
        base, _ = await timed_bind(rig, root, None, size_mib * MIB)
        for _ in range(times):
            guest = await asyncio.to_thread(rig.guest, base, size_mib * MIB)
            await asyncio.to_thread(guest.dirty, 0, dirty_mib * MIB)
            snapshot, took_ms = await timed_bind(rig, guest, base, size_mib * MIB)
            binds.append(took_ms)
            reads += await asyncio.to_thread(first_touches, rig.file(snapshot), size_mib * MIB, 20)
            guest.end()
    return binds, reads


async def faults_and_packing(size_mib: int, generations: int) -> dict[str, float]:
    """Faults on a chain of frozen processes, then of the same snapshot packed, with the packs cached and not."""
    size, found = size_mib * MIB, {}
    async with running_pager() as rig:
        parent: SnapshotId | None = None
        for _ in range(generations):
            guest = await asyncio.to_thread(rig.guest, parent, size)
            await asyncio.to_thread(guest.dirty, 0, size if parent is None else size // 4)
            parent, _ = await timed_bind(rig, guest, parent, size)
            await rig.client.end_of_load(parent)
        assert parent is not None
        found |= await faults(rig, parent, size, "frozen")
        began = time.perf_counter()
        found["pack_mib_s"] = await rig.pack(parent) / MIB / (time.perf_counter() - began)
        for guest in rig.guests:
            guest.end()
        drop_cache(rig.file(parent))
        found |= await faults(rig, parent, size, "packed")
        await rig.stop()
        await rig.start()
        for pack in (rig.home / "store" / "packs").iterdir():
            drop_cache(pack)
        found |= await faults(rig, parent, size, "packed_cold")
    async with running_pager() as rig:
        guest = await asyncio.to_thread(rig.guest, None, size)
        await asyncio.to_thread(guest.dirty, 0, size)
        parent, _ = await timed_bind(rig, guest, None, size)
        found["sequential_gb_s"] = await asyncio.to_thread(sequential, rig.file(parent), size)
        await rig.pack(parent)
        drop_cache(rig.file(parent))
        found["sequential_packed_gb_s"] = await asyncio.to_thread(sequential, rig.file(parent), size)
    return found


async def faults(rig: Rig, snapshot: SnapshotId, size_bytes: int, name: str) -> dict[str, float]:
    """Median and 99th percentile of first touches."""
    taken = await asyncio.to_thread(first_touches, rig.file(snapshot), size_bytes, 500)
    return {
        f"fault_{name}_us": statistics.median(taken),
        f"fault_{name}_p99_us": statistics.quantiles(taken, n=100)[98],
    }


async def measure() -> dict[str, object]:
    results: dict[str, object] = {"read_ahead_kib": mount.READ_AHEAD_KIB}
    results |= await faults_and_packing(256, 4)
    for size_mib, dirty_mib in ((512, 0), (512, 256), (8192, 0), (8192, 256)):
        binds, reads = await bind_and_complete(size_mib, dirty_mib, 5)
        results[f"bind_{size_mib}_mib_dirty_{dirty_mib}_ms"] = statistics.median(binds)
        results[f"fault_after_bind_{size_mib}_mib_dirty_{dirty_mib}_us"] = statistics.median(reads)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    results = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in asyncio.run(measure()).items()
    }
    if arguments.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:45} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
