"""Booting: a machine from an image or from its own disk, and the template snapshot that spares the next boot."""

import asyncio
import contextlib
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from forkypig.daemon.server import now_us
from forkypig.errors import InvalidRequest, MachineFailed
from forkypig.guest.channel import GuestChannel, Identity
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.new_snapshot import NewSnapshot, first_record
from forkypig.hostd.packing import pack_later
from forkypig.hostd.records import MachineRecord, SnapshotPhase, SnapshotRecord
from forkypig.hostd.shells import Parts, Shell
from forkypig.images.store import ImageFiles
from forkypig.model import (
    ImageId,
    Machine,
    MachineConfig,
    MachineId,
    MachineState,
    Shape,
    Snapshot,
    SnapshotId,
    SnapshotKind,
)
from forkypig.net.slot import Slot
from forkypig.qemu import memory, split
from forkypig.qemu.command import DirectBoot, Hardware
from forkypig.qemu.process import last_words

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

# A Debian guest answers 3.5 s after its start under TCG on an idle core; dozens may boot side by side.
BOOT_TIMEOUT_S = 180.0


async def boot_machine(
    host: "Host",
    machine_id: MachineId,
    name: str,
    image: ImageId,
    shape: Shape,
    config: MachineConfig,
    tenant: str,
) -> Machine:
    """Boots a machine from an image; returns when its agent has answered."""
    hardware = host.hardware()
    host.network.check_room(1)
    host.network.check_possible(config)
    parts = host.maker.new_parts()
    files = host.images.files(image)
    live = host.new_machine(
        MachineRecord(
            machine=Machine(
                id=machine_id,
                name=name,
                state=MachineState.CREATING,
                image=image,
                shape=shape,
                accelerator=hardware.accelerator,
                accelerator_reason=host.accelerator_reason,
                created_us=now_us(),
                config=config,
                tenant=tenant,
            ),
            hardware=hardware,
            process_id=parts.process_id,
            disk=parts.disk,
            console=parts.console,
            memory=None,
            generation_id=host.no_generation,
        )
    )
    try:
        _check_size(files, shape)
        await host.maker.new_overlay(parts, shape, image, None)
        await _boot(host, live, parts)
    except BaseException:
        await host.discard_machine(live)
        raise
    return live.view()


async def start_machine(host: "Host", live: LiveMachine) -> Machine:
    """Boots a stopped machine from its own disk."""
    with live.operation("starting", MachineState.STOPPED, MachineState.FAILED):
        await host.network.renew(live)
        old = host.maker.parts(live.record.process_id)
        parts = replace(host.maker.new_parts(), disk=live.record.disk)
        await _boot(host, live, parts)
        old.discard_process()
        return live.view()


async def _boot(host: "Host", live: LiveMachine, parts: Parts) -> None:
    """Starts QEMU with the image's kernel on `parts.disk`, and waits for the agent to take on the identity."""
    async with contextlib.AsyncExitStack() as undo:
        machine, was = live.record.machine, live.slot
        undo.push_async_callback(live.leave_group)
        shell = await _start(
            host,
            machine.image,
            machine.shape,
            live.record.hardware,
            parts,
            live.record.console,
            snapshot=machine.snapshot,
            slot=was,
        )
        undo.push_async_callback(shell.process.kill)
        if shell.slot is not was:
            undo.push_async_callback(host.network.release, shell.slot)
        elif was is not None:
            was.switch(parts.process_id)
        await host.network.join(shell.slot, live.tenant)
        if was is None:  # else it is as it was before the stop
            await host.network.configure(shell.slot, shell.process, None, machine.config)
        await host.limit(live, shell.process)
        identity = Identity(hostname=live.name, machine_id=secrets.token_hex(16), forked=False)
        channel = await greet(live.id, shell, identity)
        undo.pop_all()
    live.process, live.channel, live.slot = shell.process, channel, shell.slot
    host.watch(live)
    live.update(
        MachineState.RUNNING,
        process_id=parts.process_id,
        memory=None,
        generation_id=shell.generation_id,
        machine_id=identity.machine_id,
        held=False,
        slot=shell.slot.name if shell.slot is not None else "",
    )
    await host.started(live)


async def _start(
    host: "Host",
    image: ImageId,
    shape: Shape,
    hardware: Hardware,
    parts: Parts,
    console: Path,
    snapshot: SnapshotId | None = None,
    slot: Slot | None = None,
) -> Shell:
    files = host.images.files(image)
    boot = DirectBoot(files.kernel, files.initrd, files.cmdline)
    return await host.maker.start(
        parts,
        hardware=hardware,
        shape=shape,
        image=image,
        snapshot=snapshot,
        memory=None,
        boot=boot,
        console=console,
        slot=slot,
    )


async def greet(name: str, shell: Shell, identity: Identity | None) -> GuestChannel:
    """Waits for the agent of a machine that boots; fails at once when QEMU ends."""
    channel = GuestChannel(name)
    opening = asyncio.create_task(
        channel.open(
            shell.process.directory / "agent.sock", identity=identity, orphans="kill", deadline_s=BOOT_TIMEOUT_S
        )
    )
    ended = asyncio.create_task(shell.process.ended.wait())
    try:
        await asyncio.wait({opening, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            raise MachineFailed(f"the machine ended while it booted: {last_words(shell.process.directory)}")
        await opening
    except BaseException:
        opening.cancel()
        await asyncio.wait({opening})
        await channel.close()
        raise
    finally:
        ended.cancel()
    return channel


async def make_template(host: "Host", snapshot_id: SnapshotId, image: ImageId, shape: Shape, tenant: str) -> Snapshot:
    """Boots an image and freezes it, once its agent has answered, as a template. No machine is left of it."""
    if snapshot_id in host.snapshots:
        return host.snapshots[snapshot_id].snapshot
    hardware = host.hardware()
    parts = host.maker.new_parts()
    files = host.images.files(image)
    async with contextlib.AsyncExitStack() as undo:
        _check_size(files, shape)
        await host.maker.new_overlay(parts, shape, image, None)
        undo.callback(parts.discard)
        shell = await _start(host, image, shape, hardware, parts, parts.console)
        undo.push_async_callback(shell.discard)
        channel = await greet(snapshot_id, shell, None)
        await channel.settle()
        await channel.close()
        process = shell.process
        await split.check_can_be_saved(process)
        size_bytes = shape.memory_mib << 20
        address = await asyncio.to_thread(memory.address, process.pid, None, size_bytes)
        record = _template_record(host, snapshot_id, image, shape, hardware, parts, address)
        record = replace(record, snapshot=replace(record.snapshot, tenant=tenant))
        await host.pager.reserve(snapshot_id, size_bytes, None, process.pid, address)
        undo.push_async_callback(host.forget_memory, snapshot_id)
        await split.stop(process)
        await split.save(process, record.devices)
        undo.callback(record.devices.unlink, missing_ok=True)
        process.freeze()
        await host.pager.bind(snapshot_id)
        host.save_snapshot(record)
        undo.pop_all()
    host.keep_frozen(record, process)
    await host.network.release(shell.slot)
    host.spawn(process.session.close(), f"close-{process.id}")
    pack_later(host, snapshot_id)
    return record.snapshot


def _template_record(
    host: "Host", snapshot_id: SnapshotId, image: ImageId, shape: Shape, hardware: Hardware, parts: Parts, address: int
) -> SnapshotRecord:
    return first_record(
        host,
        NewSnapshot(snapshot_id, SnapshotKind.TEMPLATE),
        hardware,
        image,
        shape,
        phase=SnapshotPhase.FROZEN,
        process_id=parts.process_id,
        address=address,
        disk=parts.disk,
        memory=None,
    )


def _check_size(files: ImageFiles, shape: Shape) -> None:
    """Raises InvalidRequest where the image does not fit on the disk."""
    smallest = -(-files.disk.stat().st_size >> 20)
    if shape.disk_mib < smallest:
        raise InvalidRequest(f"a disk of {shape.disk_mib} MiB can't hold the image: use --disk {smallest}M or more")
