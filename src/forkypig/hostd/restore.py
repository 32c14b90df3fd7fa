"""A machine that is there goes on from a snapshot: restored to an earlier moment, woken from hibernation, brought back.

The new process is made ready beside the old one, whose processors stand still from just before the new one's run:
two guests with one address would answer for each other. The old one ends when the machine's record names the new one.
A failure before that lets the old one go on; so does the next hostd (hostd/adopt.py), which believes the record.

    shell     a shell on the snapshot, in the machine's network; its cgroup     it is discarded
    hold      the record says so, and the old process stops                     `cont`
    switch    packets for the machine wait for the new process                  back to the old one
    load      the guest runs, and takes on what is new (entropy, clock)         it is discarded
    record    the machine is the new process                                    nothing to undo
    end       the old process and its disk go                                   the next hostd does it
"""

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

import structlog

from forkypig.core.lifecycle import check_restorable
from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.guest.channel import GuestChannel
from forkypig.guest.identity import Identity, Tcp
from forkypig.hostd import boot, children, faults
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import MachineRecord, SnapshotRecord
from forkypig.hostd.shells import Shell
from forkypig.model import Machine, MachineState, SnapshotKind
from forkypig.net.slot import Slot
from forkypig.qemu import split
from forkypig.qemu.process import Process

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

_RESTORABLE = (
    MachineState.RUNNING,
    MachineState.PAUSED,
    MachineState.STOPPED,
    MachineState.HIBERNATED,
    MachineState.FAILED,
)
# Machines that come back after a reboot, at the same time: each keeps a core busy.
_COME_BACK = 2


async def restore_machine(host: "Host", live: LiveMachine, record: SnapshotRecord) -> Machine:
    """The machine goes back to a snapshot: memory and disk; id, name, address, ports and config stay. Then it runs.

    Raises NotPossibleNow where the snapshot does not fit or can't be loaded here, Busy, ResourceExhausted,
    MachineFailed, GuestUnresponsive; it is then as it was."""
    check_restorable(live.record.machine, record.snapshot)
    host.check_loadable(record)
    children.check_memory(1)
    host.network.check_possible(live.record.machine.config)
    with live.operation("restoring", *_RESTORABLE):
        own = record.snapshot.machine == live.id
        await _become(host, live, record, _identity(live, own=own, tcp="reset"))
    return live.view()


async def wake_machine(host: "Host", live: LiveMachine) -> Machine:
    """A hibernated machine goes on where it was."""
    with live.operation("waking", MachineState.HIBERNATED):
        record = host.snapshots.get(live.record.memory) if live.record.memory is not None else None
        if record is None:
            raise NotPossibleNow(
                f"machine «{live.name}» can't wake, the snapshot with its memory is gone: put it back to another "
                f"with forky restore {live.name} SNAPSHOT, or remove it with forky rm {live.name}"
            )
        host.check_loadable(record)
        children.check_memory(1)
        await _become(host, live, record, _identity(live, own=True, tcp="keep"))
    return live.view()


def _identity(live: LiveMachine, *, own: bool, tcp: Tcp) -> Identity:
    """Entropy and clock are new in any case: what was drawn after the snapshot must not be drawn again. `own`: the
    snapshot is the machine's, so its machine id and SSH keys are too; else it gets its machine id back."""
    machine_id = live.record.machine_id or secrets.token_hex(16)
    return Identity(hostname=live.name, machine_id=machine_id, own=own, tcp=tcp)


async def _become(host: "Host", live: LiveMachine, record: SnapshotRecord, identity: Identity) -> None:
    """The machine is a new process on the snapshot; what it was is gone."""
    old, old_channel = live.process, live.channel
    async with contextlib.AsyncExitStack() as undo, host.births:
        if old is None:
            await host.network.renew(live)
            undo.push_async_callback(live.leave_group)
        was = live.record
        faults.reach("restore-shell")
        memory = host.memory_path(record.snapshot.id)
        shell = await host.maker.for_snapshot(record, memory, console=was.console, slot=live.slot)
        undo.push_async_callback(shell.discard)
        await host.limit(live, shell.process)
        if old is not None and live.state is MachineState.RUNNING:
            await _hold(live, old, undo)
        faults.reach("restore-switch")
        await _connect(host, live, shell, undo)
        faults.reach("restore-load")
        channel = await children.load(live, shell, identity, undo)
        faults.reach("restore-record")
        undo.callback(_put_back, live, live.record, old, old_channel, live.slot)
        live.process, live.channel, live.slot = shell.process, channel, shell.slot
        live.stand_on(
            record.snapshot.id,
            hardware=record.hardware,
            process_id=shell.parts.process_id,
            disk=shell.parts.disk,
            memory=record.snapshot.id,
            generation_id=shell.generation_id,
            slot=shell.slot.name if shell.slot is not None else "",
            held=False,
        )
        live.update(MachineState.RUNNING)
        undo.pop_all()
    await host.settle(live)  # before the disk that the record on disk may still name goes
    faults.reach("restore-end")
    await _end_old(host, live, was, old, old_channel)


async def _hold(live: LiveMachine, old: Process, undo: contextlib.AsyncExitStack) -> None:
    """The old process stands still; should anything fail, it goes on."""
    live.update(held=True)
    undo.push_async_callback(_go_on, live, old)
    faults.reach("restore-hold")
    await split.stop(old)


async def _go_on(live: LiveMachine, old: Process) -> None:
    try:
        await split.resume(old)
        live.update(held=False)
    except ForkyError as error:
        log.error("the machine did not go on after it could not be restored", machine=live.id, error=str(error))


async def _connect(host: "Host", live: LiveMachine, shell: Shell, undo: contextlib.AsyncExitStack) -> None:
    """Packets for the machine go to the new process."""
    old, config = live.process, live.record.machine.config
    if live.slot is not None:
        live.slot.switch(shell.parts.process_id)
        if old is not None:
            undo.callback(live.slot.switch, old.id)
    elif old is not None and shell.slot is None:
        undo.push_async_callback(host.network.hand_back, config, old, shell.process)
        await host.network.hand_over(config, old, shell.process)
    else:
        await host.network.join(shell.slot, live.tenant)
        await host.network.configure(shell.slot, shell.process, None, config)


def _put_back(
    live: LiveMachine, record: MachineRecord, process: Process | None, channel: GuestChannel | None, slot: Slot | None
) -> None:
    live.record, live.process, live.channel, live.slot = record, process, channel, slot


async def _end_old(
    host: "Host", live: LiveMachine, was: MachineRecord, old: Process | None, channel: GuestChannel | None
) -> None:
    live.stalled = ""
    host.watch(live)
    if channel is not None:
        await channel.close()
    if old is not None:
        old.on_end = None
        await old.kill()
    if was.process_id:
        host.maker.parts(was.process_id).discard_process()
        with contextlib.suppress(OSError):
            was.disk.unlink(missing_ok=True)


# -- coming back -------------------------------------------------------------------------------------------------------


def last_durable(host: "Host", live: LiveMachine) -> SnapshotRecord | None:
    """The newest kept snapshot of the machine that lies on disk: one that was taken of it, or that it started from."""
    snapshot = live.record.machine.snapshot
    seen = set()
    while snapshot is not None and snapshot not in seen and (record := host.snapshots.get(snapshot)) is not None:
        seen.add(snapshot)
        if record.snapshot.kind is SnapshotKind.KEPT and record.is_durable:
            return record
        if record.snapshot.machine != live.id:
            return None
        snapshot = record.snapshot.parent
    return None


async def come_back(host: "Host", machines: list[tuple[LiveMachine, SnapshotRecord | None]]) -> None:
    """Machines that are to run (`--restart always`) and don't, since the host or their QEMU was ended: each comes back
    from its snapshot, or else boots from its disk."""
    turns = asyncio.Semaphore(_COME_BACK)

    async def one(live: LiveMachine, record: SnapshotRecord | None) -> None:
        async with turns:
            try:
                if record is None or not await _from_snapshot(host, live, record):
                    await boot.start_machine(host, live)
                    log.info("came back from its disk", machine=live.id)
            except (ForkyError, OSError) as error:
                log.error("a machine did not come back", machine=live.id, error=str(error))

    await asyncio.gather(*(one(live, record) for live, record in machines))


async def _from_snapshot(host: "Host", live: LiveMachine, record: SnapshotRecord) -> bool:
    """Whether it came back; if not, it is as it was."""
    try:
        await restore_machine(host, live, record)
    except ForkyError as error:
        log.error("a machine can't come back from its snapshot", machine=live.id, error=str(error))
        return False
    log.info("came back", machine=live.id, snapshot=record.snapshot.id)
    return True
