"""The pause while other machines keep every core busy, while snapshots are being packed, and while the disk is busy."""

import asyncio
import os
import threading
from pathlib import Path

from bench.console import watching
from bench.instance import instance
from bench.processes import cores
from bench.session import Session
from bench.splits import record, split_often

SECTION = "busy"
PACKING = "packing"
DISK = "disk"
_NEIGHBOURS = 2
_BURST_MIB, _BETWEEN_S = 384, 0.6


async def run(session: Session) -> None:
    """Two neighbours with as many spinning vCPUs each as the host has cores."""
    machine = await session.forky.run()
    neighbours = [await session.forky.run(cpus=cores()) for _ in range(_NEIGHBOURS)]
    for neighbour in neighbours:
        await session.instance.start_program(neighbour, "spinner")
    await asyncio.sleep(2)
    splits = await split_often(machine, session.times(30, 8))
    record(session, SECTION, splits, neighbours=_NEIGHBOURS, spinning_vcpus=_NEIGHBOURS * cores())
    await session.instance.clear()


async def packing(session: Session) -> None:
    """An instance of its own that packs in the background: each split meets the packing of those before."""
    async with instance(pack=True) as other:
        inner = Session(other, session.results, session.quick, session.began)
        machine = await other.forky.run()
        assert machine.info.qemu_pid is not None
        with watching(machine.info.qemu_pid) as watch:
            await other.start_program(machine, "rewriter", "256")
            await other.start_program(machine, "ticker")
            await watch.ticking()
            splits = await split_often(machine, session.times(20, 3), watch, passes=1)
        record(inner, PACKING, splits, dirty_mib=256)
        packed = sum(snapshot.packed for snapshot in await other.forky.snapshots())
        session.results.add(PACKING, "snapshots packed meanwhile", "of all", [packed], splits=len(splits.pause_ms))


async def disk(session: Session) -> None:
    """A guest that writes, and a program on the host that writes bursts to the same file system and syncs them."""
    machine = await session.forky.run()
    await session.instance.start_program(machine, "writer")
    ending = threading.Event()
    bursts = asyncio.create_task(asyncio.to_thread(_write_bursts, session.home / "burst", ending))
    try:
        splits = await split_often(machine, session.times(40, 6))
    finally:
        ending.set()
        await bursts
    record(session, DISK, splits, burst_mib=_BURST_MIB)
    await session.instance.clear()


def _write_bursts(path: Path, ending: threading.Event) -> None:
    mebibyte = os.urandom(1 << 20)
    while not ending.wait(_BETWEEN_S):
        with path.open("wb", buffering=0) as file:
            for _ in range(_BURST_MIB):
                file.write(mebibyte)
            os.fdatasync(file.fileno())
    path.unlink(missing_ok=True)
