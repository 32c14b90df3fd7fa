"""The end: what `forky down` does on a host before its daemons go."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.hostd.lifecycle import stop_machine
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.packing import pack, stop_packing
from forkypig.model import MachineState, Progress

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()


async def shut_down(host: "Host") -> AsyncIterator[Progress]:
    """Before `forky down`: machines are shut down, snapshots are packed, no QEMU is left.

    What can't be packed is named at the end, when all the rest is safe.
    """
    await host.begin_end()
    await host.pool.close()
    machines = [m for m in host.machines.values() if m.state in (MachineState.RUNNING, MachineState.PAUSED)]
    ends = [asyncio.ensure_future(_stop(host, live)) for live in machines]
    for done, end in enumerate(asyncio.as_completed(ends)):
        yield Progress("shutting machines down", done, len(machines))
        await end
    failures = []
    frozen = list(host.frozen)
    for done, snapshot in enumerate(frozen):
        await stop_packing(host, snapshot)
        yield Progress("packing snapshots", done, len(frozen))
        try:
            async for _ in pack(host, snapshot):
                pass
        except ForkyError as error:
            if snapshot in host.snapshots:  # else it was removed meanwhile, as nobody needs it
                failures.append(f"{snapshot}: {error}")
    yield Progress("packing snapshots", len(frozen), len(frozen))
    if not failures:
        await host.network.close(remove=True)
        await asyncio.to_thread(host.groups.remove_all)
        await asyncio.to_thread(host.ksm.put_back)
    if failures:
        host.ending = False
        raise NotPossibleNow(
            "some snapshots could not be packed and stay in memory, so Forky Pig goes on running: "
            + "; ".join(failures)
        )


async def _stop(host: "Host", live: LiveMachine) -> None:
    try:
        await stop_machine(host, live, force=False)
    except ForkyError as error:
        log.warning("machine was not shut down in peace", machine=live.id, error=str(error))
        await host.end_machine(live)
