"""What a child costs the host in memory: idle, alone and among siblings, and after it has touched 64 MiB."""

import asyncio

from bench.instance import checked
from bench.processes import available_mib, memory
from bench.session import Session
from forkypig.sdk.machine import Machine

SECTION = "density"
PARTS = ("guest pages of its own", "guest pages shared", "translated code", "the rest of QEMU")
_IDLE_S = 5.0  # its agent's last work after the fork is done by then
_TOUCHED_MIB = 64
_TOUCHING = 4  # of the ten; a fresh Python in each takes its time under TCG


async def run(session: Session) -> None:
    """PSS of the children's QEMU processes, and what the whole host lost per child as a check on it."""
    parent = await session.forky.run()
    for siblings in (1, 10):
        before = available_mib()
        children = (await parent.fork(siblings)).children
        await asyncio.sleep(_IDLE_S)
        _record(session, "idle", children, siblings)
        lost = (before - available_mib()) / siblings
        session.results.add(SECTION, "host memory per child", "MiB", [lost], state="idle", siblings=siblings)
        if siblings > 1:
            for child in children[:_TOUCHING]:
                await _touch(session, child)
            await asyncio.sleep(1)
            _record(session, "touched 64 MiB", children[:_TOUCHING], siblings)
    await session.instance.clear()


def _record(session: Session, state: str, children: tuple[Machine, ...], siblings: int) -> None:
    found = [memory(child.info.qemu_pid) for child in children if child.info.qemu_pid is not None]
    labels: dict[str, str | int] = {"state": state, "siblings": siblings}
    session.tell(session.results.add(SECTION, "PSS", "MiB", [each.pss_mib for each in found], **labels))
    for part, samples in (
        (PARTS[0], [each.guest_own_mib for each in found]),
        (PARTS[1], [each.guest_shared_mib for each in found]),
        (PARTS[2], [each.code_mib for each in found]),
        (PARTS[3], [each.rest_mib for each in found]),
    ):
        session.results.add(SECTION, part, "MiB", samples, **labels)


async def _touch(session: Session, child: Machine) -> None:
    await session.instance.start_program(child, "toucher", str(_TOUCHED_MIB))
    await checked(child, "sh", "-c", "until [ -e /run/touched ]; do sleep 0.05; done")
