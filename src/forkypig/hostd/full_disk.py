"""A machine that can't write because the host's disk is full.

QEMU stops it then (werror=enospc, its default), and nothing is lost: the write is done again when it goes on. Without
a word it would seem to hang, so here it is noticed, said, and let go on as soon as there is room.
"""

import asyncio
import shutil
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError, MachineFailed
from forkypig.hostd.machine import LiveMachine
from forkypig.model import MachineState
from forkypig.qemu import split
from forkypig.qemu.process import Process

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()

_LOOK_S = 1.0
# A session that was closed says nothing: this often it is seen whether the process is still the machine's.
_STILL_S = 10.0
# With less, the next write would stop it again at once.
_ROOM_BYTES = 32 << 20


async def watch(host: "Host", live: LiveMachine, process: Process) -> None:
    """Until the machine runs in another process, or in none."""
    with process.session.events("BLOCK_IO_ERROR") as events:
        while live.process is process:
            try:
                event = await events.next(_STILL_S)
            except MachineFailed:
                continue
            if event["data"]["action"] == "stop" and not live.stalled:
                await _wait_for_room(host, live, process)


async def _wait_for_room(host: "Host", live: LiveMachine, process: Process) -> None:
    home = host.settings.home
    log.error("a machine stands still: the disk is full", machine=live.id, home=str(home))
    live.stall(f"waiting for room below {home}")
    while live.process is process and live.state is MachineState.PAUSED:
        await asyncio.sleep(_LOOK_S)
        if shutil.disk_usage(home).free < _ROOM_BYTES:
            continue
        try:
            await split.resume(process)
        except ForkyError as error:
            log.error("a machine does not go on", machine=live.id, error=str(error))
        else:
            log.info("a machine goes on: there is room again", machine=live.id)
            live.stall("")
        return
