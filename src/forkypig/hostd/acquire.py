"""A machine that waited in a pool, paused, is somebody's now: it runs, its clock is right, it has the name asked for.

The answer does not wait for the guest. The time lies in the agent's channel before the processors run, and the agent
reads in order: no command, copy or terminal of the new owner can find the clock of the moment at which the machine was
paused. A guest that was late to read it, since the host is busy, has it set again behind the answer. Programs that the
pool's snapshot brought with it see the old time for the milliseconds until then.
"""

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError
from forkypig.guest.calls import Call
from forkypig.guest.channel import CLOCK_TOLERANCE_S, GuestChannel
from forkypig.guest.identity import Identity
from forkypig.hostd import faults
from forkypig.hostd.machine import LiveMachine
from forkypig.model import Machine, MachineState
from forkypig.qemu import split

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

# An agent that has just run answers at once; every core may be taken.
_CLOCK_S = 30.0
_RENAME_S = 60.0
# The answer is on its way by then.
_BEHIND_S = 0.01


async def acquire_machine(host: "Host", live: LiveMachine, name: str) -> Machine:
    """Lets it run. One that runs already, under this name, goes on: the call was repeated.

    Raises NotPossibleNow, Busy, MachineFailed; GuestUnresponsive where its agent can't be told the new name."""
    if live.state is MachineState.RUNNING and live.name == name:
        return live.view()
    with live.operation("acquiring", MachineState.PAUSED):
        process = live.running_process()
        channel, sent, began = live.channel, None, time.monotonic()
        if channel is not None and name == live.name:
            sent = channel.send_clock()
        faults.reach("acquire-run")
        await split.resume(process)
        live.note(MachineState.RUNNING)
        host.spawn(_write_down(host, live), f"acquired-{live.id}")
        if name != live.name:
            await _rename(live, name)
        elif channel is not None and sent is not None:
            host.spawn(_see_to_clock(channel, sent, began), f"clock-{live.id}")
        else:
            await _find_agent(host, live)
    return live.view()


async def _write_down(host: "Host", live: LiveMachine) -> None:
    """Behind the answer, unless the machine was removed meanwhile."""
    await asyncio.sleep(_BEHIND_S)
    faults.reach("acquire-record")
    if host.machines.get(live.id) is live:
        try:
            live.save()
        except ForkyError as error:
            log.warning("an acquired machine was not written down", machine=live.id, error=str(error))


async def _see_to_clock(channel: GuestChannel, sent: Call, began: float) -> None:
    try:
        async with asyncio.timeout(_CLOCK_S):
            await sent.finished()
        if time.monotonic() - began > CLOCK_TOLERANCE_S:
            await channel.correct_clock(_CLOCK_S)
    except (ForkyError, TimeoutError) as error:
        log.warning("an acquired machine's clock may be late", machine=channel.machine, error=str(error))


async def _find_agent(host: "Host", live: LiveMachine) -> None:
    """hostd was started anew since the machine was paused: its agent could not answer until now."""
    if live.finding_agent is None or live.finding_agent.done():
        host.find_agent(live)
    await (await live.ready_agent()).set_clock()


async def _rename(live: LiveMachine, name: str) -> None:
    """The guest gets its name, and fresh entropy and the time with it, by another greeting."""
    process = live.running_process()
    await live.close_channel()
    live.record = replace(live.record, machine=replace(live.record.machine, name=name))
    live.save()
    identity = Identity(hostname=name, machine_id=live.record.machine_id or "0" * 32, own=True, forked=False)
    channel = GuestChannel(live.id)
    try:
        await channel.open(process.directory / "agent.sock", identity=identity, orphans="run", deadline_s=_RENAME_S)
    except BaseException:
        await channel.close()
        raise
    live.channel = channel
