"""A machine whose disk fails: the host's disk is full, or what it reads from is away for a while.

QEMU stops it then (werror=stop, rerror=stop), and nothing is lost: the request is done again when the machine goes on.
Without a word it would seem to hang, so here it is noticed, said, and let go on as soon as it can.
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
                full = bool(event["data"].get("nospace"))
                await _wait(host, live, process, full=full, reason=str(event["data"].get("reason", "")))


async def _wait(host: "Host", live: LiveMachine, process: Process, *, full: bool, reason: str) -> None:
    """Until the machine goes on. Where its disk can't be read the pager may have begun anew, and what QEMU has open is
    the old one's: so it is opened again before each attempt, and an error that stays stops the machine again."""
    home = host.settings.home
    log.error("a machine stands still: its disk fails", machine=live.id, home=str(home), full=full, reason=reason)
    live.stall(f"waiting for room below {home}" if full else f"because its disk can't be read or written: {reason}")
    said = ""
    while live.process is process and live.state is MachineState.PAUSED:
        await asyncio.sleep(_LOOK_S)
        if shutil.disk_usage(home).free < _ROOM_BYTES and full:
            continue
        try:
            if not full:
                await host.folding.open_again(live)
            await split.resume(process)
        except ForkyError as error:
            if str(error) != said:
                log.error("a machine does not go on yet", machine=live.id, error=str(error))
            said = str(error)
        else:
            log.info("a machine goes on", machine=live.id)
            live.stall("")
            return
