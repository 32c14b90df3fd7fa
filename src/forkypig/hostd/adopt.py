"""Adoption: after a crash or an upgrade of hostd, machines run on, and the new hostd finds out what is true.

What lies in the records is held against the processes that run, known by their command lines. Half-made machines are
removed, a split in the middle is finished when its successor has run and undone when not.
"""

import asyncio
import signal
from collections.abc import Container
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError
from forkypig.hostd import hibernation
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.packing import pack_later, packed, users
from forkypig.hostd.records import MachineRecord, SnapshotPhase, SnapshotRecord
from forkypig.hostd.restore import come_back, last_durable
from forkypig.model import MachineState, Restart, SnapshotId
from forkypig.qemu import priority, split
from forkypig.qemu import process as processes
from forkypig.qemu.process import Process, last_words
from forkypig.v1.pager_pb2 import PagerSnapshot

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()


async def adopt(host: "Host") -> None:
    """Takes up everything that is there. Called once, before hostd serves."""
    running = await asyncio.to_thread(processes.running, host.settings.home / "qemu")
    snapshots = {SnapshotId(key): record for key, record in host.snapshot_ledger.load().items()}
    machines = list(host.machine_ledger.load().values())
    for record in snapshots.values():
        if record.phase is SnapshotPhase.SPLITTING:
            machines = await _finish_split(host, record, machines, running)
        else:
            host.snapshots[record.snapshot.id] = record
    in_store = await _in_store(host)
    for record in _parents_first(host.snapshots):
        await _adopt_snapshot(host, record, running, in_store)
    for machine in machines:
        await _adopt_machine(host, machine, running)
    _drop_lost(host)
    host.folding.soon()
    coming_back = [(live, last_durable(host, live)) for live in host.machines.values() if _is_to_come_back(live)]
    await _end_strangers(host, running)
    await host.network.sweep(host.machines.values())
    await _merge(host)
    await asyncio.to_thread(host.groups.sweep, {live.id for live in host.machines.values() if live.process is not None})
    if coming_back:
        host.spawn(come_back(host, coming_back), "come-back")


async def _merge(host: "Host") -> None:
    """KSM is as it was to be; what a hostd that died did not come to is done now."""
    try:
        await asyncio.to_thread(host.ksm.begin)
    except ForkyError as error:
        log.error("KSM stays off", error=str(error))


async def _finish_split(
    host: "Host", record: SnapshotRecord, machines: list[MachineRecord], running: dict[str, int]
) -> list[MachineRecord]:
    """hostd died during a split. When the successor has run it is the machine; when not, the old process goes on."""
    snapshot = record.snapshot.id
    try:
        if await _has_run(host, record, machines, running):
            log.info("split finished", snapshot=snapshot)
            record = replace(record, phase=SnapshotPhase.FROZEN)
            host.save_snapshot(record)
            return [_on_successor(m, record) if m.process_id == record.process_id else m for m in machines]
        log.info("split undone", snapshot=snapshot)
        await _undo_split(host, record, running)
    except ForkyError as error:
        log.error("split could not be taken up", snapshot=snapshot, error=str(error))  # the machine tells its own state
    return machines


async def _has_run(
    host: "Host", record: SnapshotRecord, machines: list[MachineRecord], running: dict[str, int]
) -> bool:
    """Whether the successor of this split has run: its machine is in it or beyond it, or it says so itself."""
    if not any(m.machine.id == record.snapshot.machine and m.process_id == record.process_id for m in machines):
        return True  # the machine was written down after the split, only the snapshot was not
    pid = running.get(record.successor)
    if pid is None or record.successor_disk is None:
        return False
    if processes.is_frozen(pid):
        return True  # it was split again
    directory = host.settings.home / "qemu" / record.successor
    process = await Process.adopt(directory, record.successor, pid, connect=True)
    try:
        return (await process.session.execute("query-status"))["status"] in ("running", "paused")
    finally:
        await process.session.close()
        process.release()


async def _undo_split(host: "Host", record: SnapshotRecord, running: dict[str, int]) -> None:
    """Ends the successor and lets the old process go on."""
    if record.successor:  # a hibernation has none
        await _kill(host, record.successor, running)
        host.maker.parts(record.successor).discard()
    await host.forget_memory(record.snapshot.id)
    host.drop_snapshot_record(record.snapshot.id)
    pid = running.get(record.process_id)
    if pid is None:
        return
    directory = host.settings.home / "qemu" / record.process_id
    frozen = await Process.adopt(directory, record.process_id, pid, connect=False)
    frozen.signal(signal.SIGCONT)
    frozen.release()
    if record.was_running:
        old = await Process.adopt(directory, record.process_id, pid, connect=True)
        try:
            await split.resume(old)
        finally:
            await old.session.close()
            old.release()


def _on_successor(record: MachineRecord, split_off: SnapshotRecord) -> MachineRecord:
    assert split_off.successor_disk is not None
    return replace(
        record,
        machine=replace(record.machine, snapshot=split_off.snapshot.id),
        process_id=split_off.successor,
        disk=split_off.successor_disk,
        memory=split_off.snapshot.id,
    )


def _parents_first(snapshots: dict[SnapshotId, SnapshotRecord]) -> list[SnapshotRecord]:
    ordered: dict[SnapshotId, SnapshotRecord] = {}

    def visit(record: SnapshotRecord) -> None:
        if record.snapshot.id in ordered:
            return
        if record.memory in snapshots and record.memory is not None:
            visit(snapshots[record.memory])
        ordered[record.snapshot.id] = record

    for record in sorted(snapshots.values(), key=lambda r: r.snapshot.created_us):
        visit(record)
    return list(ordered.values())


async def _in_store(host: "Host") -> set[str]:
    """The snapshots that the pager has packed, whether hostd heard of it or not."""
    try:
        snapshots = (await host.pager.status()).snapshots
    except ForkyError as error:
        log.error("the pager does not answer", error=str(error))
        return set()
    return {each.snapshot for each in snapshots if each.state == PagerSnapshot.STATE_PACKED}


def _drop_lost(host: "Host") -> None:
    """Lost snapshots that nothing stands on, the youngest first: each may have been the last to need another."""
    for record in sorted(host.snapshots.values(), key=lambda r: r.snapshot.created_us, reverse=True):
        if record.phase is SnapshotPhase.LOST and not users(host, record.snapshot.id):
            host.drop_snapshot_record(record.snapshot.id)


async def _adopt_snapshot(
    host: "Host", record: SnapshotRecord, running: dict[str, int], in_store: Container[str]
) -> None:
    snapshot = record.snapshot.id
    size_bytes = record.snapshot.shape.memory_mib << 20
    try:
        if record.is_durable or snapshot in in_store:
            base = host.chains.image_disk(record.snapshot.image)
            await host.pager.open(snapshot, size_bytes, record.memory, base)
            await _kill(host, record.process_id, running)
            if not record.is_durable:
                await packed(host, snapshot)
            return
        pid = running.get(record.process_id)
        if record.phase is SnapshotPhase.LOST or pid is None or not processes.is_frozen(pid):
            await host.forget_memory(snapshot)
            host.lose(snapshot)
            return
        # The pager usually knows it still; after the pager's own death this tells it again.
        await host.pager.reserve(snapshot, size_bytes, record.memory, pid, record.address)
        await host.pager.bind(snapshot)
        directory = host.settings.home / "qemu" / record.process_id
        host.keep_frozen(record, await Process.adopt(directory, record.process_id, pid, connect=False))
        pack_later(host, snapshot)
    except ForkyError as error:
        log.error("snapshot can't be served", snapshot=snapshot, error=str(error))


async def _adopt_machine(host: "Host", record: MachineRecord, running: dict[str, int]) -> None:
    live = LiveMachine(record, host.machine_saver)
    host.machines[live.id] = live
    live.slot = await host.network.adopt(record.slot)
    state = live.state
    if live.slot is None and state not in (MachineState.CREATING, MachineState.REMOVING):
        live.slot = await host.network.again(record.slot, record.machine.config)
    if state in (MachineState.CREATING, MachineState.REMOVING):
        log.info("half-made machine removed", machine=live.id, state=state.value)
        await _kill(host, record.process_id, running)
        await host.discard_machine(live)
        return
    pid = running.get(record.process_id)
    if pid is None:
        slept = next((each for each in host.snapshots.values() if hibernation.is_asleep(live, each)), None)
        if slept is not None:
            hibernation.asleep(host, live, slept)
        elif _is_to_come_back(live):
            live.update(
                MachineState.FAILED, failure="its QEMU process ended while hostd was away; it comes back", held=True
            )
        elif state in (MachineState.RUNNING, MachineState.PAUSED):
            directory = host.settings.home / "qemu" / record.process_id
            live.update(
                MachineState.FAILED,
                failure=f"its QEMU process ended while hostd was away ({last_words(directory)}); "
                f"`forky start {live.name}` boots it again from its disk",
            )
        return
    if state in (MachineState.STOPPED, MachineState.HIBERNATED, MachineState.FAILED):
        await _kill(host, record.process_id, running)
        return
    await _adopt_running(host, live, pid)


def _should_run(live: LiveMachine) -> bool:
    """Whether it ran when it was last heard of, or was about to be brought back."""
    return live.state in (MachineState.RUNNING, MachineState.PAUSED) or (
        live.state is MachineState.FAILED and live.record.held
    )


def _is_to_come_back(live: LiveMachine) -> bool:
    return live.process is None and _should_run(live) and live.record.machine.config.restart is Restart.ALWAYS


async def _adopt_running(host: "Host", live: LiveMachine, pid: int) -> None:
    record = live.record
    priority.normal(pid)  # hostd may have died in the middle of a split
    try:
        live.process = await Process.adopt(
            host.settings.home / "qemu" / record.process_id, record.process_id, pid, connect=True
        )
        runs = await split.is_running(live.process)
    except ForkyError as error:
        live.update(MachineState.FAILED, failure=f"its QEMU does not answer: {error}")
        return
    try:
        await host.limit(live, live.process)
    except ForkyError as error:
        log.error("a machine runs without its limits", machine=live.id, error=str(error))
    host.network.point(live)  # hostd may have died after the switch of a split that was undone
    if record.held and not runs:  # hostd died in a restore that this undoes
        await split.resume(live.process)
        runs = True
    host.watch(live)
    live.update(MachineState.RUNNING if runs else MachineState.PAUSED, held=False)
    log.info("adopted", machine=live.id, pid=pid, state=live.state.value)
    host.find_agent(live)


async def _kill(host: "Host", process_id: str, running: dict[str, int]) -> None:
    """Ends a process of ours by its id; one that does not run is fine."""
    pid = running.pop(process_id, None)
    if pid is not None:
        process = await Process.adopt(host.settings.home / "qemu" / process_id, process_id, pid, connect=False)
        await process.kill()


async def _end_strangers(host: "Host", running: dict[str, int]) -> None:
    """Ends QEMU processes of this home that no record names (shells, mostly) and removes their files."""
    named = {live.record.process_id for live in host.machines.values()}
    named |= {record.process_id for record in host.snapshots.values()}
    for process_id in list(running):
        if process_id not in named:
            log.info("process without a record ended", process=process_id)
            await _kill(host, process_id, running)
    disks = {live.record.disk for live in host.machines.values()} | {r.disk for r in host.snapshots.values()}
    consoles = {live.record.console.name for live in host.machines.values()}
    consoles |= {f"{record.process_id}.log" for record in host.snapshots.values()}
    await asyncio.to_thread(_remove_leftovers, host, named, {disk.name for disk in disks}, consoles)


def _remove_leftovers(host: "Host", named: set[str], disks: set[str], consoles: set[str]) -> None:
    for directory in (host.settings.home / "qemu").iterdir():
        if directory.name not in named:
            host.maker.parts(directory.name).discard_process()
    for folder, kept in (("disks", disks), ("consoles", consoles)):
        for path in (host.settings.home / folder).iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
