"""Pause, resume, stop, remove: the small operations on one machine."""

import asyncio
import contextlib
from typing import TYPE_CHECKING

from forkypig.errors import Busy, ForkyError, ResourceExhausted
from forkypig.hostd.machine import LiveMachine
from forkypig.model import Machine, MachineConfig, MachineState
from forkypig.qemu import split

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

# A guest ends its processes, syncs and powers off; under TCG on a busy host that takes seconds.
_POWEROFF_TIMEOUT_S = 30.0
# A removal that meets an operation waits for its end (a fork of a hundred children on two cores takes seconds).
_REMOVE_WAITS_S = 120.0
_CONFIGURABLE = (
    MachineState.RUNNING,
    MachineState.PAUSED,
    MachineState.STOPPED,
    MachineState.HIBERNATED,
    MachineState.FAILED,
)


async def pause_machine(live: LiveMachine) -> Machine:
    """Stops the vCPUs; a machine that is paused already stays so."""
    if live.state is not MachineState.PAUSED:
        with live.operation("pausing", MachineState.RUNNING):
            await split.stop(live.running_process())
            live.update(MachineState.PAUSED)
    return live.view()


async def resume_machine(live: LiveMachine) -> Machine:
    """Lets the vCPUs run again; a machine that runs already goes on."""
    if live.state is not MachineState.RUNNING:
        with live.operation("resuming", MachineState.PAUSED):
            await split.resume(live.running_process())
            live.update(MachineState.RUNNING)
            if live.channel is not None:
                with contextlib.suppress(
                    ForkyError
                ):  # the guest's clock stood still; a clock that is late is no failure
                    await live.channel.set_clock()
    return live.view()


async def configure_machine(host: "Host", live: LiveMachine, config: MachineConfig) -> Machine:
    """Changes a machine's network, ports and limits at once. On failure they are what they were."""
    with live.operation("updating", *_CONFIGURABLE):
        was = live.record.machine.config
        await host.network.change(live, was, config)
        if live.group is not None and config.limits != was.limits:
            try:
                await asyncio.to_thread(live.group.set, config.limits)
            except ForkyError:
                await host.network.change(live, config, was)
                raise
        live.configured(config)
        await host.settle(live)
    return live.view()


async def stop_machine(host: "Host", live: LiveMachine, *, force: bool) -> Machine:
    """Shuts the guest down (`force`: cuts the power). Its disk stays, its memory does not."""
    if live.state is not MachineState.STOPPED:
        with live.operation("stopping", MachineState.RUNNING, MachineState.PAUSED):
            await _end_process(host, live, force=force)
            live.update(MachineState.STOPPED)
            await host.settle(live)  # else one that is to run would come back after a power cut
    return live.view()


async def _end_process(host: "Host", live: LiveMachine, *, force: bool) -> None:
    process = live.running_process()
    host.unwatch(live)
    if live.state is MachineState.RUNNING and live.channel is not None and not force:
        with contextlib.suppress(ForkyError, OSError, TimeoutError):
            async with asyncio.timeout(_POWEROFF_TIMEOUT_S):
                await live.channel.poweroff()
                await process.ended.wait()
    await live.close_channel()
    await process.quit()
    live.process = None
    await live.leave_group()
    host.maker.parts(process.id).discard_process()


async def remove_machine(host: "Host", live: LiveMachine) -> None:
    """Ends the machine and removes its disk. Waits for an operation on it to end; what was forked from it stays."""
    try:
        async with asyncio.timeout(_REMOVE_WAITS_S):
            while True:
                with contextlib.suppress(Busy), live.operation("removing", *MachineState):
                    with contextlib.suppress(ResourceExhausted):  # no room for the record; the removal makes some
                        live.update(MachineState.REMOVING)
                    await host.discard_machine(live)
                    return
                if live.removed.is_set():
                    return
                await asyncio.sleep(0.02)
    except TimeoutError as error:
        raise Busy(f"machine «{live.name}»", live.view().operation) from error
