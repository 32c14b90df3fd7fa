"""Snapshots on disk: how fast they get there, how much they take, and what machines that start from them pay."""

import time
from pathlib import Path

import numpy as np

from bench.instance import checked
from bench.processes import calm, memory
from bench.session import Session
from forkypig.chunks import manifest_file
from forkypig.chunks.format import PAGE_BYTES
from forkypig.chunks.store import Store
from forkypig.model import Progress, Snapshot

SECTION = "durable"
DEPTHS = (1, 16)
# As the guest reckons. For the host some 200 MiB are not zero then (the results say how many): also what its kernel has
# for itself, and pages that were freed since it booted.
_IN_USE_MIB = 158
_CHANGED_MIB = 10
_SNAPSHOTS = 10
REWRITTEN_MIB = 150
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


async def run(session: Session) -> None:
    """Needs root, to empty the page cache."""
    await _pack(session)
    await session.instance.clear()
    await _first_exec(session)
    await session.instance.clear()
    await _depth(session)
    await session.instance.clear()
    await _restore(session)
    await session.instance.clear()


# Writes MiB of pages to a file in memory, each half random: they compress to a half, and none is like another.
_HALF_RANDOM = """
import os, sys
with open(sys.argv[1], "wb", 0) as file:
    for _ in range(int(sys.argv[2])):
        file.write(b"".join(os.urandom(2048) + bytes(2048) for _ in range(256)))
"""
# Reads all that is on the disk, until so many MiB are in use.
_READ_FILES = """
import os, sys
for directory, _, names in os.walk("/usr"):
    for name in names:
        words = dict(line.split(":") for line in open("/proc/meminfo"))
        if (int(words["MemTotal"].split()[0]) - int(words["MemFree"].split()[0])) >> 10 >= int(sys.argv[1]):
            sys.exit()
        if os.path.isfile(path := os.path.join(directory, name)):
            with open(path, "rb") as file:
                while file.read(1 << 20):
                    pass
"""
_USED = "awk '/MemTotal/ {t=$2} /MemFree/ {f=$2} END {print int((t-f)/1024)}' /proc/meminfo"


async def _pack(session: Session) -> None:
    """A machine that uses 200 MiB, and then ten snapshots, with 10 MiB of random bytes written before each; then some
    with 150 MiB."""
    machine = await session.forky.run()
    # What the guest reads is in its memory: real programs and data, not bytes that compress as no memory does.
    await checked(machine, "python3", "-c", _READ_FILES, str(_IN_USE_MIB))
    in_use = float(await checked(machine, "sh", "-c", _USED))
    session.results.add(SECTION, "memory in use, as the guest reckons", "MiB", [in_use], what="first snapshot")
    before = _store_mib(session)
    grew: list[float] = []
    for number in range(_SNAPSHOTS):
        if number:
            await checked(machine, "dd", "if=/dev/urandom", "of=/dev/shm/x", "bs=1M", f"count={_CHANGED_MIB}")
        snapshot = await machine.snapshot()
        bytes_, took_s = await _packed(session, snapshot)
        rate = bytes_ / (1 << 20) / took_s
        what = "first snapshot" if number == 0 else f"after {_CHANGED_MIB} MiB of changes"
        session.results.add(
            SECTION, "memory that is not zero", "MiB", [_not_zero_mib(session, snapshot)], what=what, number=number + 1
        )
        session.results.add(SECTION, "packed", "MiB/s", [rate], what=what, number=number + 1)
        session.results.add(SECTION, "packing took", "ms", [took_s * 1000], what=what, number=number + 1)
        after = _store_mib(session)
        grew.append(after - before)
        before = after
    session.tell(session.results.add(SECTION, "store grew", "MiB", grew[:1], what="first snapshot"))
    session.tell(
        session.results.add(SECTION, "store grew", "MiB", grew[1:], what=f"after {_CHANGED_MIB} MiB of changes")
    )
    for what, command in (
        ("half random", ("python3", "-c", _HALF_RANDOM, "/dev/shm/x", str(REWRITTEN_MIB))),
        ("random", ("dd", "if=/dev/urandom", "of=/dev/shm/x", "bs=1M", f"count={REWRITTEN_MIB}")),
    ):
        rates = []
        for _ in range(session.times(4, 2)):
            await checked(machine, *command)
            bytes_, took_s = await _packed(session, await machine.snapshot())
            rates.append(bytes_ / (1 << 20) / took_s)
        what = f"after {REWRITTEN_MIB} MiB of {what} bytes"
        session.tell(session.results.add(SECTION, "packed", "MiB/s", rates, what=what))


async def _packed(session: Session, snapshot: Snapshot) -> tuple[int, float]:
    """Packs; how many bytes were looked at, and how long it took in s."""
    last = Progress("")

    def tell(progress: Progress) -> None:
        nonlocal last
        last = progress

    began = time.perf_counter()
    await session.forky.pack(snapshot.id, on_progress=tell)
    return last.total, time.perf_counter() - began


def _not_zero_mib(session: Session, snapshot: Snapshot) -> float:
    store = Store.open(session.home / "store")
    pages = manifest_file.load(store, snapshot.id).memory.expand(store)
    store.close()
    return int(np.count_nonzero(pages)) * PAGE_BYTES / (1 << 20)


def _store_mib(session: Session) -> float:
    files = (session.home / "store").rglob("*")
    return sum(path.stat().st_blocks for path in files if path.is_file()) * 512 / (1 << 20)


async def _first_exec(session: Session) -> None:
    """A fork of a snapshot and one command in the child: in memory, packed, and packed with an empty page cache."""
    machine = await session.forky.run()
    snapshot = await machine.snapshot()
    times = session.times(10, 3)
    await _start(session, snapshot)  # the first one warms the page cache
    for state in ("in memory", "packed", "packed, page cache empty"):
        if state == "packed":
            await session.forky.pack(snapshot.id)
            await _start(session, snapshot)
        samples = []
        for _ in range(times):
            await calm()
            if state == "packed, page cache empty":
                _DROP_CACHES.write_text("3")
            samples.append((await _start(session, snapshot))[0])
        session.tell(session.results.add(SECTION, "first exec in a child", "ms", samples, state=state))


async def _start(session: Session, snapshot: Snapshot) -> tuple[float, float]:
    """From the fork to the end of a command in the child, in ms; and its PSS in MiB."""
    began = time.perf_counter()
    child = (await session.forky.fork(snapshot.id)).children[0]
    await checked(child, "true")
    took_ms = (time.perf_counter() - began) * 1000
    assert child.info.qemu_pid is not None
    pss_mib = memory(child.info.qemu_pid).pss_mib
    await child.remove()
    return took_ms, pss_mib


async def _depth(session: Session) -> None:
    """Starts from a snapshot with one and with sixteen below it, in turns."""
    machine = await session.forky.run()
    found: dict[int, Snapshot] = {}
    for depth in range(1, max(DEPTHS) + 1):
        await checked(machine, "sh", "-c", f"head -c 1000000 /dev/urandom > /root/{depth}; sync")
        snapshot = await machine.snapshot()
        await session.forky.pack(snapshot.id)
        if depth in DEPTHS:
            found[depth] = snapshot
    took: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for _ in range(session.times(10, 3) + 1):
        for depth, snapshot in found.items():
            await calm()
            took[depth].append(await _start(session, snapshot))
    for depth, samples in took.items():
        warm = samples[1:]
        session.tell(session.results.add(SECTION, "start", "ms", [each[0] for each in warm], depth=depth))
        session.results.add(SECTION, "PSS after the start", "MiB", [each[1] for each in warm], depth=depth)


async def _restore(session: Session) -> None:
    """Going back in place, against a fork of the same snapshot, in turns."""
    machine = await session.forky.run()
    snapshot = await machine.snapshot()
    forks: list[float] = []
    restores: list[float] = []
    for _ in range(session.times(10, 3)):
        await calm()
        began = time.perf_counter()
        child = (await session.forky.fork(snapshot.id)).children[0]
        forks.append((time.perf_counter() - began) * 1000)
        await child.remove()
        await calm()
        began = time.perf_counter()
        await machine.restore(snapshot.id)
        restores.append((time.perf_counter() - began) * 1000)
    session.tell(session.results.add(SECTION, "goes on", "ms", forks, way="fork of a snapshot"))
    session.tell(session.results.add(SECTION, "goes on", "ms", restores, way="restore in place"))
    began = time.perf_counter()
    await machine.hibernate()
    session.results.add(SECTION, "hibernated", "ms", [(time.perf_counter() - began) * 1000])
    await machine.refresh()
    session.results.add(
        SECTION, "QEMU processes of a hibernated machine", "", [float(machine.info.qemu_pid is not None)]
    )
    began = time.perf_counter()
    await machine.wake()
    session.results.add(SECTION, "woken", "ms", [(time.perf_counter() - began) * 1000])
