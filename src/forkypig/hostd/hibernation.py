"""Hibernation: a machine's memory goes to a snapshot on disk, and its QEMU ends.

A split without a successor. Until the snapshot is on disk the frozen process is there and can go on, so every failure
before that is undone; the record of the snapshot says SPLITTING until then, by which the next hostd undoes it too. When
it is on disk, the machine hibernates, also if hostd dies before that is written down (`is_asleep`).
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from forkypig.hostd import faults, fork
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.new_snapshot import NewSnapshot
from forkypig.hostd.packing import pack
from forkypig.hostd.records import SnapshotRecord
from forkypig.model import Machine, MachineState, Progress, SnapshotId, SnapshotKind
from forkypig.qemu import disks, memory, split
from forkypig.qemu.process import Process

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()


async def hibernate_machine(
    host: "Host", live: LiveMachine, snapshot: SnapshotId, show: Callable[[Progress], None]
) -> Machine:
    """Returns when the machine's state is on disk and no process is left; one that hibernates already stays so.

    Raises Busy, NotPossibleNow, ResourceExhausted (the disk is full), MachineFailed; the machine then goes on."""
    if live.state is not MachineState.HIBERNATED:
        with live.operation("hibernating", MachineState.RUNNING, MachineState.PAUSED):
            async with contextlib.AsyncExitStack() as undo:
                record = await _prepare(host, live, snapshot, undo)
                old = live.running_process()
                async with old.disks_lock:
                    await _freeze(host, old, record, undo)
                faults.reach("hibernate-pack")
                async for progress in pack(host, snapshot):
                    show(progress)
                undo.pop_all()
            faults.reach("hibernate-record")
            await _fall_asleep(host, live, host.snapshot(snapshot))
    return live.view()


async def _prepare(
    host: "Host", live: LiveMachine, snapshot: SnapshotId, undo: contextlib.AsyncExitStack
) -> SnapshotRecord:
    old = live.running_process()
    await split.check_can_be_saved(old)
    mapped = host.memory_path(live.record.memory) if live.record.memory else None
    address = await asyncio.to_thread(memory.address, old.pid, mapped, live.memory_bytes)
    await host.pager.reserve(snapshot, live.memory_bytes, live.record.memory, old.pid, address)
    undo.push_async_callback(host.forget_memory, snapshot)
    was_running = live.state is MachineState.RUNNING
    new = NewSnapshot(snapshot, SnapshotKind.HIBERNATION)
    record = fork.snapshot_record(host, live, old, new, address, was_running, successor="")
    host.save_snapshot(record)
    undo.callback(host.drop_snapshot_record, snapshot)
    await asyncio.to_thread(disks.write_back, live.record.disk)
    return record


async def _freeze(host: "Host", old: Process, record: SnapshotRecord, undo: contextlib.AsyncExitStack) -> None:
    """The process stands still for ever, unless what follows fails."""
    undo.push_async_callback(fork.go_on, old, record.was_running)
    faults.reach("hibernate-stop")
    if record.was_running:
        await split.stop(old)
    await split.save(old, record.devices)
    old.freeze()
    faults.reach("hibernate-bind")
    await host.pager.bind(record.snapshot.id)
    undo.callback(setattr, old, "on_end", old.on_end)
    undo.callback(host.frozen.pop, record.snapshot.id, None)
    host.keep_frozen(record, old)


async def _fall_asleep(host: "Host", live: LiveMachine, record: SnapshotRecord) -> None:
    process, live.process = live.process, None
    await live.close_channel()
    if process is not None:
        await process.session.close()
    await live.leave_group()
    asleep(host, live, record)
    await host.settle(live)


def is_asleep(live: LiveMachine, record: SnapshotRecord) -> bool:
    """Whether this is the snapshot into which the machine went when hostd died, without a word of it in its record."""
    return (
        record.snapshot.kind is SnapshotKind.HIBERNATION
        and record.is_durable
        and record.snapshot.machine == live.id
        and record.process_id == live.record.process_id
    )


def asleep(host: "Host", live: LiveMachine, record: SnapshotRecord) -> None:
    """Writes down that it hibernates. Its disk is the snapshot's now, so it has none of its own until it wakes."""
    nothing = host.maker.new_parts().disk
    live.stand_on(record.snapshot.id, process_id="", disk=nothing, memory=record.snapshot.id)
    live.update(MachineState.HIBERNATED)
