"""The split: a running machine becomes a snapshot for ever, and goes on in a successor.

In order, with what a failure costs at each step (docs/split.md has the reasons):

    prepare   the pager offers the memory; an overlay and a shell for the successor    nothing happened
    stop      vCPUs stand still: the pause begins                                      `cont`
    save      device state goes to a file; the old QEMU lets go of its disk            `cont`
    freeze    SIGSTOP; the pager serves the old process's memory                       SIGCONT, `cont`
    load      the successor loads the device state and runs: the pause ends            end it, SIGCONT, `cont`
    move      the agent's channel goes over; the machine is the successor now          nothing to undo
    children  load the same state, side by side, each with its own identity            remove the children

Until the successor's vCPUs have run once the old process can go on as if nothing had been, so every failure before
that is undone, and nothing can fail after it that would cost the machine.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from forkypig import tracing
from forkypig.errors import ForkyError
from forkypig.hostd import children, faults
from forkypig.hostd.children import NewChild
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.new_snapshot import NewSnapshot, first_record
from forkypig.hostd.packing import pack_later
from forkypig.hostd.pause import Marks
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.hostd.shells import Shell
from forkypig.model import ForkOptions, ForkResult, MachineState
from forkypig.net.tap import Remainder
from forkypig.qemu import disks, memory, priority, split
from forkypig.qemu.process import Process

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

# How long processes have to come to a stop: one in an uninterruptible wait is waited for, and its disk may be slow.
_QUIESCE_S = 5.0


async def fork_machine(
    host: "Host", live: LiveMachine, new: NewSnapshot, new_children: Sequence[NewChild], options: ForkOptions
) -> ForkResult:
    """Forks a machine: hot when it runs, cold when it is paused (then it stays paused).

    Raises Busy, NotPossibleNow, ResourceExhausted, MachineFailed or GuestUnresponsive; the machine then goes on as it
    was and nothing of the fork is left, unless the machine itself was what failed.
    """
    began = time.perf_counter()
    children.check_possible(host, new_children, options)
    with live.operation("forking", MachineState.RUNNING, MachineState.PAUSED):
        record, pause_ms = await split_machine(host, live, new, quiesce=options.quiesce)
    born: list[LiveMachine] = []
    try:
        born.extend(children.announce(host, record, child) for child in new_children)
        made = await children.bear_all(host, record, born, options, began=began)
    except (ForkyError, OSError):
        for child in born:
            await host.discard_machine(child)
        raise
    pack_later(host, record.snapshot.id)
    return ForkResult(
        snapshot=host.snapshots[record.snapshot.id].snapshot, parent=live.id, pause_ms=pause_ms, children=made
    )


async def split_machine(
    host: "Host", live: LiveMachine, new: NewSnapshot, *, quiesce: bool
) -> tuple[SnapshotRecord, float]:
    """Splits a machine into a snapshot and a successor; returns the snapshot and the pause in ms (0 if paused)."""
    old = live.running_process()
    was_running = live.state is MachineState.RUNNING
    async with old.disks_lock, contextlib.AsyncExitStack() as always, contextlib.AsyncExitStack() as undo:
        with tracing.span("prepare"):
            record, successor = await _prepare(host, live, old, new, was_running, undo)
        remainder = None
        if live.slot is not None:
            remainder = await live.slot.remainder(old.tap(), successor.parts.process_id)
            always.callback(_close_later, host, remainder)
        synced_s = await asyncio.to_thread(disks.write_back, live.record.disk)
        if quiesce:
            undo.push_async_callback(_thaw, live)
            await live.agent().quiesce(_QUIESCE_S)
        favour = live.group.real_time() if live.group is not None else contextlib.nullcontext()
        undo.push_async_callback(host.network.hand_back, live.record.machine.config, old, successor.process)
        await host.network.hand_over(live.record.machine.config, old, successor.process)
        split_pids = (old.pid, successor.process.pid)
        async with host.network.calm():
            with favour, priority.during_split(split_pids, host.split_pids()):
                marks = await _pause(host, live, old, successor, record, remainder, undo)
        undo.pop_all()
    pause_ms = marks.pause_ms
    log.info("split", machine=live.id, snapshot=new.id, synced_ms=round(synced_s * 1000, 2), **marks.fields())
    tracing.record("pause", marks.steps(), machine=live.id, snapshot=new.id)
    # The successor runs: from here on it is the machine, whatever else happens.
    record = replace(
        record,
        phase=SnapshotPhase.FROZEN,
        snapshot=replace(record.snapshot, pause_ms=round(pause_ms, 3) if was_running else 0.0),
    )
    _take_over(host, live, old, successor, record)
    with tracing.span("move the agent's channel"):
        await host.move_channel(live)
        if quiesce:
            await _thaw(live)
    faults.reach("record")
    host.save_snapshot(record)
    live.save()
    await host.settle(live)  # or what the guest syncs from now on would be on an overlay that nobody knows
    return record, record.snapshot.pause_ms


async def _thaw(live: LiveMachine) -> None:
    """The machine's user processes go on. Where the agent can't be told it finds out by itself, after a while."""
    try:
        async with asyncio.timeout(_QUIESCE_S):
            await live.agent().thaw()
    except (ForkyError, TimeoutError) as error:
        log.warning("the agent was not told to thaw", machine=live.id, error=str(error))


async def _prepare(
    host: "Host", live: LiveMachine, old: Process, new: NewSnapshot, was_running: bool, undo: contextlib.AsyncExitStack
) -> tuple[SnapshotRecord, Shell]:
    """All that can be done while the parent runs. Nothing here can hurt it."""
    await split.check_can_be_saved(old)
    mapped = host.memory_path(live.record.memory) if live.record.memory else None
    address = await asyncio.to_thread(memory.address, old.pid, mapped, live.memory_bytes)
    faults.reach("reserve")
    path = await host.pager.reserve(new.id, live.memory_bytes, live.record.memory, old.pid, address)
    undo.push_async_callback(host.forget_memory, new.id)
    parts = host.maker.new_parts()
    record = snapshot_record(host, live, old, new, address, was_running, parts.process_id)
    faults.reach("overlay")
    # From here on the machine's overlay is known as the snapshot's, and so as what the successor stands on.
    host.save_snapshot(replace(record, successor_disk=parts.disk))
    undo.callback(host.drop_snapshot_record, new.id)
    await host.maker.new_overlay(parts, record.snapshot.shape, record.snapshot.image, new.id)
    undo.callback(parts.discard)
    faults.reach("shell")
    successor = await host.maker.start(
        parts,
        hardware=live.record.hardware,
        shape=live.record.machine.shape,
        image=record.snapshot.image,
        snapshot=new.id,
        memory=path,
        paused=not was_running,
        console=live.record.console,
        generation_id=live.record.generation_id,
        slot=live.slot,
    )
    undo.push_async_callback(successor.discard)
    joining = asyncio.create_task(host.limit(live, successor.process))
    undo.push_async_callback(asyncio.wait, {joining})
    await split.offer_state(successor.process, record.devices)
    priority.foreground(successor.process.pid)
    faults.reach("prepare")
    await joining
    if live.channel is not None:
        await live.channel.prepare_move(successor.process.directory / "agent.sock")
        undo.callback(live.channel.abandon_move)
    return record, successor


async def _pause(
    host: "Host",
    live: LiveMachine,
    old: Process,
    successor: Shell,
    record: SnapshotRecord,
    remainder: Remainder | None,
    undo: contextlib.AsyncExitStack,
) -> Marks:
    """From `stop` to the successor running; returns what happened when."""
    undo.push_async_callback(_go_on, old, successor, record.was_running)
    faults.reach("switch")
    if live.slot is not None:
        # From here on packets for the machine wait in the successor's queue; what the old process sends still goes out.
        live.slot.switch(successor.parts.process_id)
        undo.callback(live.slot.switch, old.id)
    faults.reach("stop")
    began = time.perf_counter()
    if record.was_running:
        await split.stop(old)
    stopped = time.perf_counter()
    faults.reach("save")
    await split.save(old, record.devices)
    saved = time.perf_counter()
    faults.reach("freeze")
    old.freeze()
    frozen = time.perf_counter()
    faults.reach("bind")
    binding = asyncio.create_task(host.pager.bind(record.snapshot.id))
    undo.push_async_callback(asyncio.wait, {binding})
    if remainder is not None:
        with contextlib.suppress(OSError):  # TCP sends again what is lost here
            remainder.carry_over()
    faults.reach("load")
    handed = time.perf_counter()
    await split.load(successor.process, paused=not record.was_running)
    marks = Marks(began, stopped, saved, frozen, handed, time.perf_counter())
    await binding
    return marks


def _close_later(host: "Host", remainder: Remainder) -> None:
    """Closing a packet socket waits for a grace period of the kernel, some 10 ms: not in who serves all machines."""
    host.spawn(asyncio.to_thread(remainder.close), "close-remainder")


async def _go_on(old: Process, successor: Shell, was_running: bool) -> None:
    """Undoes a split whose successor has not run: the old process goes on.

    The successor ends first, since it may hold the disk. `cont` takes the disk back, and there is no other command
    that does: a machine that was paused runs for the millisecond in between.
    """
    await successor.process.kill()
    await go_on(old, was_running)


async def go_on(old: Process, was_running: bool) -> None:
    """A frozen process is what it was before."""
    old.signal(signal.SIGCONT)
    try:
        await split.resume(old)
        if not was_running:
            await split.stop(old)
    except ForkyError as error:
        log.error("the machine did not go on after what failed", process=old.id, error=str(error))


def snapshot_record(
    host: "Host", live: LiveMachine, old: Process, new: NewSnapshot, address: int, was_running: bool, successor: str
) -> SnapshotRecord:
    machine = live.record.machine
    return first_record(
        host,
        new,
        live.record.hardware,
        machine.image,
        machine.shape,
        parent=machine.snapshot,
        machine=live.id,
        tenant=machine.tenant,
        phase=SnapshotPhase.SPLITTING,
        process_id=old.id,
        address=address,
        disk=live.record.disk,
        memory=live.record.memory,
        successor=successor,
        was_running=was_running,
    )


def _take_over(host: "Host", live: LiveMachine, old: Process, successor: Shell, record: SnapshotRecord) -> None:
    """The machine is the successor now; the old process belongs to the snapshot. Can't fail: only memory changes.

    Until the records are saved, what lies on disk says «splitting», which after a crash is taken up from what runs.
    """
    host.unwatch(live)
    live.process = successor.process
    live.stand_on(
        record.snapshot.id, process_id=successor.parts.process_id, disk=successor.parts.disk, memory=record.snapshot.id
    )
    host.watch(live)
    host.keep_frozen(record, old)
    host.spawn(asyncio.to_thread(host.groups.park, old.pid), f"park-{old.id}")
    host.end_of_load(record.snapshot.id)
    host.spawn(old.session.close(), f"close-{old.id}")
