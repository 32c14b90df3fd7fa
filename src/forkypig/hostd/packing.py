"""Packing: a snapshot's memory, disk and device state go to the chunk store, and the frozen process ends.

The pager does the work, in a process of its own at low priority; here is when, and what follows: the record is saved so
that it survives a power cut, the process and the files that were the snapshot go, and machines are folded onto the
packed disk (folding.py). A snapshot that somebody keeps is packed at once, one that came with a fork after a while, if
something stands on it then: a fork that is thrown away at once is never written.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.hostd import faults
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.images.manifest import DISK
from forkypig.model import Progress, SnapshotId, SnapshotKind
from forkypig.pager.order import BaseImage, Disk, DiskLayer, Extent, PackOrder
from forkypig.qemu.extents import own_extents

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

# After this it is looked whether a disk that was full has room again, or somebody needs what nobody needed.
_AGAIN_S, _LONGEST_S = 5.0, 60.0
_TELL_EVERY_S = 0.25  # to who waits for another one's packing how far that is
_AT_ONCE = (SnapshotKind.KEPT, SnapshotKind.HIBERNATION)


def pack_later(host: "Host", snapshot: SnapshotId) -> None:
    """Packs a snapshot in the background, when its time has come."""
    if not host.settings.pack_in_background or snapshot in host.packing or snapshot not in host.frozen:
        return
    task = asyncio.create_task(_when_it_is_time(host, snapshot), name=f"pack-{snapshot}")
    host.packing[snapshot] = task
    task.add_done_callback(lambda _: host.packing.pop(snapshot, None))


async def stop_packing(host: "Host", snapshot: SnapshotId) -> None:
    """It is not packed in the background any more. What the pager has begun goes on to its end."""
    if (task := host.packing.get(snapshot)) is not None:
        task.cancel()
        await asyncio.wait({task})


async def _when_it_is_time(host: "Host", snapshot: SnapshotId) -> None:
    wait_s = 0.0 if host.snapshots[snapshot].snapshot.kind in _AT_ONCE else host.settings.pack_after_s
    again_s = _AGAIN_S
    while True:
        await asyncio.sleep(wait_s)
        wait_s, again_s = again_s, min(2 * again_s, _LONGEST_S)
        record = host.snapshots.get(snapshot)
        if record is None or snapshot not in host.frozen:
            return
        if record.snapshot.kind is SnapshotKind.FORK and not users(host, snapshot):
            continue
        try:
            async for _ in pack(host, snapshot):
                pass
        except (ForkyError, OSError) as error:
            log.warning("a snapshot stays in memory for now", snapshot=snapshot, error=str(error))


async def pack(host: "Host", snapshot: SnapshotId) -> AsyncGenerator[Progress, None]:
    """Makes a snapshot durable; one that is already, or that is gone, is fine. One at a time on a host.

    Raises ResourceExhausted when the disk is full, NotPossibleNow, MachineFailed; the snapshot then stays as it is.
    """
    turn = asyncio.ensure_future(host.packing_turn.acquire())
    try:
        while not (await asyncio.wait({turn}, timeout=_TELL_EVERY_S))[0]:
            busy_with, progress = host.packed_so_far
            yield progress if busy_with == snapshot else Progress("waiting for another packing")
        async with contextlib.aclosing(_pack(host, snapshot)) as packing:
            async for progress in packing:
                host.packed_so_far = snapshot, progress
                yield progress
    finally:
        if not turn.cancel():
            host.packing_turn.release()


async def _pack(host: "Host", snapshot: SnapshotId) -> AsyncGenerator[Progress, None]:
    record = host.snapshots.get(snapshot)
    if record is None or snapshot not in host.frozen:
        return
    order = await _order(host, record)
    faults.reach("pack")
    async for progress in host.pager.pack(snapshot, order):
        yield progress
    faults.reach("pack-record")
    await packed(host, snapshot)


async def _order(host: "Host", record: SnapshotRecord) -> PackOrder:
    snapshot = record.snapshot
    layers = []
    below: SnapshotId | None = snapshot.id
    for each in host.chains.unpacked(snapshot.id):
        found = await own_extents(each.disk)
        extents = [Extent(extent.guest_offset, extent.length, extent.file_offset) for extent in found]
        layers.append(DiskLayer(each.disk, extents))
        below = each.snapshot.parent
    manifest = await asyncio.to_thread(host.images.manifest, snapshot.image)
    base = BaseImage(snapshot.image, host.images.root / snapshot.image / DISK, manifest.files[DISK].sha256)
    return PackOrder(
        devices=record.devices,
        disk=Disk(size_bytes=snapshot.shape.disk_mib << 20, layers=layers, below=below, base=base),
        qemu_build=snapshot.qemu_build,
        machine_type=snapshot.machine_type,
        cpu_model=snapshot.cpu_model,
        accelerator=snapshot.accelerator,
        shape=snapshot.shape,
        created_us=snapshot.created_us,
        cpu=record.cpu,
        cpu_features=record.cpu_features,
    )


async def packed(host: "Host", snapshot: SnapshotId) -> None:
    """The pager has packed it: writes that down for good, and lets go of all that it was made of."""
    await _settle_machines(host)
    record = await _save(host, snapshot, own_memory_bytes=await _own_memory(host, snapshot))
    if record is None:
        return
    faults.reach("pack-end")
    log.info("packed", snapshot=snapshot, own_mib=record.snapshot.own_memory_bytes >> 20)
    await host.pool.renew(record, host.memory_path(snapshot))
    process = host.frozen.pop(snapshot, None)
    if process is not None:
        await process.kill()
    host.maker.parts(record.process_id).discard_process()
    record.devices.unlink(missing_ok=True)
    host.folding.soon()


async def _settle_machines(host: "Host") -> None:
    """A machine's record as it is on disk may be from before its last split: then it would come back from an earlier
    snapshot, and name an overlay that goes when its snapshot is packed."""
    for live in list(host.machines.values()):
        await host.settle(live)


async def _own_memory(host: "Host", snapshot: SnapshotId) -> int:
    """How much memory is not its parent's, as the pager says."""
    with contextlib.suppress(ForkyError):
        return await host.pager.own_bytes(snapshot)
    return 0


async def _save(host: "Host", snapshot: SnapshotId, *, own_memory_bytes: int) -> SnapshotRecord | None:
    """The record says PACKED, and does so after a power cut. None when the snapshot was removed meanwhile."""
    while (seen := host.snapshots.get(snapshot)) is not None:
        try:
            own_disk_bytes = seen.disk.stat().st_blocks * 512
        except FileNotFoundError:
            own_disk_bytes = seen.snapshot.own_disk_bytes
        record = replace(
            seen,
            phase=SnapshotPhase.PACKED,
            snapshot=replace(
                seen.snapshot, packed=True, own_memory_bytes=own_memory_bytes, own_disk_bytes=own_disk_bytes
            ),
        )
        prepared = await asyncio.to_thread(host.snapshot_ledger.prepare, snapshot, record)
        if host.snapshots.get(snapshot) is not seen:
            prepared.unlink(missing_ok=True)  # it was changed or removed while the disk was busy
            continue
        host.snapshot_ledger.put(snapshot, prepared)
        host.snapshots[snapshot] = record
        await asyncio.to_thread(host.snapshot_ledger.sync)
        return record
    return None


def users(host: "Host", snapshot: SnapshotId) -> list[str]:
    """Who stands on a snapshot: names of machines, ids of snapshots."""
    machines = [
        live.name for live in host.machines.values() if snapshot in (live.record.machine.snapshot, live.record.memory)
    ]
    snapshots = [
        other.snapshot.id
        for other in host.snapshots.values()
        if snapshot in (other.snapshot.parent, other.memory) and other.snapshot.id != snapshot
    ]
    return machines + snapshots


def _awake(host: "Host") -> list[LiveMachine]:
    """Machines that have a disk of their own: all but those that hibernate."""
    return [live for live in host.machines.values() if live.record.process_id]


async def remove_snapshot(host: "Host", record: SnapshotRecord) -> None:
    """Removes a snapshot that nothing stands on. Raises NotPossibleNow, naming who does."""
    snapshot = record.snapshot.id
    if record.phase is SnapshotPhase.SPLITTING or any(live.record.disk == record.disk for live in _awake(host)):
        raise NotPossibleNow(f"snapshot {snapshot} is being made, its disk is still a machine's: try again in a moment")
    if by := users(host, snapshot):
        raise NotPossibleNow(
            f"snapshot {record.snapshot.tag or snapshot} is needed by {', '.join(by[:5])}"
            + (f" and {len(by) - 5} more" if len(by) > 5 else "")
            + ": remove these first"
        )
    await stop_packing(host, snapshot)
    await host.pool.drop(snapshot)
    await host.forget_memory(snapshot)
    process = host.frozen.pop(snapshot, None)
    if process is not None:
        await process.kill()
    host.drop_snapshot_record(snapshot)
    host.maker.parts(record.process_id).discard_process()
    with contextlib.suppress(OSError):
        record.disk.unlink(missing_ok=True)
    if record.snapshot.kind is SnapshotKind.TEMPLATE:
        with contextlib.suppress(OSError):
            host.maker.parts(record.process_id).console.unlink(missing_ok=True)
