"""Settling: a snapshot's memory goes from the frozen process to its layer file, and the process ends.

Begins some time after the split, at low priority, so that a fork which is thrown away at once is never written.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.hostd.lifecycle import stop_machine
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.model import MachineState, Progress, SnapshotId, SnapshotKind

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()


def settle_later(host: "Host", snapshot: SnapshotId) -> None:
    """Settles a snapshot in the background after FORKY_SETTLE_AFTER_S."""
    if snapshot in host.settling or snapshot not in host.frozen:
        return
    task = asyncio.create_task(_after_a_while(host, snapshot), name=f"settle-{snapshot}")
    host.settling[snapshot] = task
    task.add_done_callback(lambda _: host.settling.pop(snapshot, None))


async def _after_a_while(host: "Host", snapshot: SnapshotId) -> None:
    await asyncio.sleep(host.settings.settle_after_s)
    try:
        async for _ in settle(host, snapshot):
            pass
    except ForkyError as error:
        log.warning("snapshot stays in its frozen process", snapshot=snapshot, error=str(error))


async def settle(host: "Host", snapshot: SnapshotId) -> AsyncIterator[Progress]:
    """Writes the snapshot's own pages to its layer, then ends the frozen process. Raises ResourceExhausted when the
    disk is full; the snapshot then stays where it is."""
    if snapshot not in host.frozen:
        return
    own_bytes = 0
    async for progress in host.pager.settle(snapshot):
        own_bytes = progress.total
        yield progress
    record = host.snapshots.get(snapshot)
    process = host.frozen.pop(snapshot, None)
    if record is None or process is None:
        return
    log.info("settled", snapshot=snapshot, own_mib=own_bytes >> 20)
    host.save_snapshot(
        replace(
            record,
            phase=SnapshotPhase.SETTLED,
            snapshot=replace(record.snapshot, settled=True, own_memory_bytes=own_bytes),
        )
    )
    await process.kill()
    host.maker.parts(process.id).discard_process()


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


async def remove_snapshot(host: "Host", record: SnapshotRecord) -> None:
    """Removes a snapshot that nothing stands on. Raises NotPossibleNow, naming who does."""
    snapshot = record.snapshot.id
    if by := users(host, snapshot):
        raise NotPossibleNow(
            f"snapshot {record.snapshot.tag or snapshot} is needed by {', '.join(by[:5])}"
            + (f" and {len(by) - 5} more" if len(by) > 5 else "")
            + ": remove these first"
        )
    settling = host.settling.get(snapshot)
    if settling is not None:
        settling.cancel()
        await asyncio.wait({settling})
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


async def shut_down(host: "Host") -> AsyncIterator[Progress]:
    """Before `forky down`: machines are shut down, the memory of snapshots goes to files, no QEMU is left.

    What can't be written is named at the end, when all the rest is safe.
    """
    await host.pool.close()
    machines = [m for m in host.machines.values() if m.state in (MachineState.RUNNING, MachineState.PAUSED)]
    ends = [asyncio.ensure_future(_stop(host, live)) for live in machines]
    for done, end in enumerate(asyncio.as_completed(ends)):
        yield Progress("shutting machines down", done, len(machines))
        await end
    failures = []
    frozen = list(host.frozen)
    for done, snapshot in enumerate(frozen):
        if (delayed := host.settling.get(snapshot)) is not None:
            delayed.cancel()
            await asyncio.wait({delayed})
        yield Progress("writing snapshots", done, len(frozen))
        try:
            async for _ in settle(host, snapshot):
                pass
        except ForkyError as error:
            if snapshot in host.snapshots:  # else it was removed meanwhile, as nobody needs it
                failures.append(f"{snapshot}: {error}")
    yield Progress("writing snapshots", len(frozen), len(frozen))
    if not failures:
        await host.network.close(remove=True)
        await asyncio.to_thread(host.groups.remove_all)
    if failures:
        raise NotPossibleNow(
            "some snapshots could not be written and stay in memory, so Forky Pig goes on running: "
            + "; ".join(failures)
        )


async def _stop(host: "Host", live: LiveMachine) -> None:
    try:
        await stop_machine(host, live, force=False)
    except ForkyError as error:
        log.warning("machine was not shut down in peace", machine=live.id, error=str(error))
        await host.end_machine(live)
