"""Children: a shell loads a snapshot, and its agent takes on an identity of its own before anyone may use it."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from forkypig import tracing
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, GuestUnresponsive, MachineFailed, ResourceExhausted
from forkypig.guest.channel import GuestChannel, Identity
from forkypig.hostd import faults
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import MachineRecord, SnapshotRecord
from forkypig.hostd.shells import Shell
from forkypig.model import Child, ForkOptions, Machine, MachineConfig, MachineId, MachineState, SnapshotKind
from forkypig.model.access import DEFAULT_TENANT
from forkypig.qemu import split
from forkypig.qemu.process import last_words

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

# The guest's own work takes 0.1 s under TCG when the host is idle; a hundred children on two cores share it.
HANDSHAKE_TIMEOUT_S = 60.0

# What a child needs at least before it has touched anything: QEMU's own memory (measured: see bench/results).
_CHILD_MIB = 32
_HOST_RESERVE_MIB = 256


@dataclass(frozen=True, slots=True)
class NewChild:
    """A child that is asked for."""

    id: MachineId
    name: str
    config: MachineConfig = MachineConfig()
    tenant: str = DEFAULT_TENANT


def check_forgettable(variables: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
    """Raises InvalidRequest for what no guest could forget."""
    Identity(hostname="child", machine_id="0" * 32, forget=variables, forget_files=files).check()


def check_possible(host: "Host", new: Sequence[NewChild], options: ForkOptions) -> None:
    """Before anything is touched: raises where the host has no memory or addresses for so many, can't give them what
    their configs say, or what they are to forget can't be."""
    check_forgettable(options.forget)
    check_memory(len(new) + 1)  # and a successor
    host.network.check_room(len(new))
    for child in new:
        host.network.check_possible(child.config)


def check_memory(count: int) -> None:
    """Raises ResourceExhausted when `count` more children could drive the host out of memory."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available_mib = int(line.split()[1]) >> 10
            break
    else:
        return
    needed_mib = count * _CHILD_MIB + _HOST_RESERVE_MIB
    if available_mib < needed_mib:
        raise ResourceExhausted(
            f"{count} children need at least {needed_mib} MiB of host memory and {available_mib} MiB are available: "
            f"fork fewer, or remove machines"
        )


def announce(host: "Host", record: SnapshotRecord, child: NewChild) -> LiveMachine:
    """Writes down that the child is on its way, before anything of it is made."""
    return host.new_machine(
        MachineRecord(
            machine=Machine(
                id=child.id,
                name=child.name,
                state=MachineState.CREATING,
                image=record.snapshot.image,
                shape=record.snapshot.shape,
                snapshot=record.snapshot.id,
                parent=record.snapshot.machine if record.snapshot.tenant == child.tenant else None,
                accelerator=record.hardware.accelerator,
                accelerator_reason=host.accelerator_reason,
                created_us=now_us(),
                config=child.config,
                tenant=child.tenant,
            ),
            hardware=record.hardware,
            process_id="",
            disk=record.disk,
            console=record.disk,
            memory=record.snapshot.id,
            generation_id=host.no_generation,
        )
    )


async def bear(host: "Host", record: SnapshotRecord, live: LiveMachine, options: ForkOptions, *, began: float) -> Child:
    """Makes one child ready. On failure nothing of it is left but its record, which the caller drops."""
    async with contextlib.AsyncExitStack() as undo:
        async with host.births:
            started = time.perf_counter()
            with tracing.span("shell"):
                shell = await host.pool.take(record.snapshot.id)
                if shell is None:
                    shell = await host.maker.for_snapshot(record, host.memory_path(record.snapshot.id))
            undo.push_async_callback(shell.discard)
            log.info(
                "child has a shell",
                machine=live.id,
                waited_ms=_ms(began, started),
                shell_ms=_ms(started, time.perf_counter()),
            )
            faults.reach("child-network")
            with tracing.span("network"):
                await host.network.join(shell.slot, live.tenant)
                await host.network.configure(shell.slot, shell.process, None, live.record.machine.config)
            joining = asyncio.create_task(host.limit(live, shell.process))  # waits for the kernel, needs no CPU
            undo.push_async_callback(asyncio.wait, {joining})
            identity = _identity(host, live, record, options)
            channel = await load(live, shell, identity, undo)
            await joining
            if options.paused:
                await split.stop(shell.process)
        faults.reach("child-record")
        undo.pop_all()
        live.process, live.channel, live.slot = shell.process, channel, shell.slot
        host.watch(live)
        live.update(
            MachineState.PAUSED if options.paused else MachineState.RUNNING,
            process_id=shell.parts.process_id,
            disk=shell.parts.disk,
            console=shell.console,
            generation_id=shell.generation_id,
            machine_id=identity.machine_id,
            slot=shell.slot.name if shell.slot is not None else "",
        )
        await host.started(live)
        return Child(live.view(), (time.perf_counter() - began) * 1000)


def _forget_files(host: "Host", record: SnapshotRecord) -> tuple[str, ...]:
    """What the image's settings say; a machine that starts from the template has what the image has."""
    if record.snapshot.kind is SnapshotKind.TEMPLATE:
        return ()
    return host.images.forget_files(record.snapshot.image)


def _identity(host: "Host", live: LiveMachine, record: SnapshotRecord, options: ForkOptions) -> Identity:
    return Identity(
        hostname=live.name,
        machine_id=secrets.token_hex(16),
        tcp=live.record.machine.config.network.tcp.value,
        forget=options.forget,
        forget_files=_forget_files(host, record),
    )


async def load(live: LiveMachine, shell: Shell, identity: Identity, undo: contextlib.AsyncExitStack) -> GuestChannel:
    """Loads the snapshot and lets the agent take on the identity; returns its channel.

    The greeting waits in the channel before the guest runs, so that the agent's first act is to read it.
    """
    channel = GuestChannel(live.id)
    undo.push_async_callback(channel.close)
    faults.reach("child-load")
    greeting = asyncio.create_task(
        channel.open(
            shell.process.directory / "agent.sock",
            identity=identity,
            orphans="run",
            deadline_s=HANDSHAKE_TIMEOUT_S,
        )
    )
    ended = asyncio.create_task(shell.process.ended.wait())
    began = time.perf_counter()
    try:
        with tracing.span("load and run"):
            await split.load(shell.process, paused=False)
        loaded = time.perf_counter()
        faults.reach("child-handshake")
        with tracing.span("handshake"):
            await asyncio.wait({greeting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not greeting.done():
            raise MachineFailed(
                f"machine «{live.name}» died before it was ready: {last_words(shell.process.directory)}"
            )
        _check_steps(live.name, (await greeting).steps)
        log.info(
            "child is ready", machine=live.id, load_ms=_ms(began, loaded), handshake_ms=_ms(loaded, time.perf_counter())
        )
    finally:
        ended.cancel()
        greeting.cancel()
        await asyncio.wait({greeting})
    return channel


def _check_steps(name: str, steps: Mapping[str, str]) -> None:
    """Raises GuestUnresponsive where something of the parent's would be left to the child. A hook or a signal that
    fails is its author's: it is logged."""
    wrong = {step: why for step, why in steps.items() if why}
    if theirs := {step: why for step, why in wrong.items() if step.startswith(("hook:", "notify:"))}:
        log.warning("a machine's programs were not told of the fork", machine=name, steps=theirs)
    if lacking := [f"{step} ({why})" for step, why in wrong.items() if step not in theirs]:
        raise GuestUnresponsive(
            f"machine «{name}» could not become one of its own, so it is not handed out: {', '.join(lacking)}"
        )


def _ms(begin: float, end: float) -> float:
    return round((end - begin) * 1000, 1)


async def _born(host: "Host", record: SnapshotRecord, live: LiveMachine, options: ForkOptions, began: float) -> Child:
    with tracing.span("child", machine=live.id):
        return await bear(host, record, live, options, began=began)


async def bear_all(
    host: "Host", record: SnapshotRecord, children: Sequence[LiveMachine], options: ForkOptions, *, began: float
) -> tuple[Child, ...]:
    """Makes all children ready, or none: when one fails the others are removed and the first error is raised."""
    births = [asyncio.create_task(_born(host, record, live, options, began)) for live in children]
    try:
        return tuple(await asyncio.gather(*births))
    except BaseException:
        for birth in births:
            birth.cancel()
        if births:
            await asyncio.wait(births)
        for live in children:
            await host.discard_machine(live)
        raise


async def fork_snapshot(
    host: "Host", record: SnapshotRecord, new: Sequence[NewChild], options: ForkOptions
) -> tuple[Child, ...]:
    """Starts children from a snapshot that is there."""
    began = time.perf_counter()
    check_possible(host, new, options)
    host.check_loadable(record)
    children: list[LiveMachine] = []
    try:
        children.extend(announce(host, record, child) for child in new)
    except (ForkyError, OSError):
        for live in children:
            await host.discard_machine(live)
        raise
    return await bear_all(host, record, children, options, began=began)
