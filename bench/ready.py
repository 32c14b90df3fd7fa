"""Time to ready for 1, 10 and 50 children, and where that time goes."""

from bench.hostlog import steps_of_children
from bench.processes import calm, cpu_ms
from bench.session import Session
from forkypig.sdk.machine import Fork
from forkypig.sdk.status import Status

SECTION = "ready"


async def run(session: Session) -> None:
    """Forks the same parent; the children of one fork go before the next."""
    parent = await session.forky.run()
    for count, times in ((1, session.times(20, 5)), (10, session.times(4, 1)), (50, session.times(3, 1))):
        each: list[float] = []
        last: list[float] = []
        spent: dict[str, list[float]] = {}
        born: set[str] = set()
        for _ in range(times):
            before = _daemons_ms(await session.forky.status())
            fork = await parent.fork(count)
            waits = [child.ready_ms or 0.0 for child in fork.children]
            each += waits
            last.append(max(waits))
            for who, cpu in _spent(before, await session.forky.status(), fork).items():
                spent.setdefault(who, []).append(cpu)
            born.update(child.id for child in fork.children)
            for child in fork.children:
                await child.remove()
            await calm()
        session.results.add(SECTION, "each child ready", "ms", each, children=count)
        session.tell(session.results.add(SECTION, "all children ready", "ms", last, children=count))
        for step, samples in steps_of_children(session.home / "logs/hostd.log", born).items():
            session.results.add(SECTION, step, "ms", samples, children=count)
        for who, samples in spent.items():
            session.results.add(SECTION, "CPU time of the fork", "ms", samples, children=count, spent_by=who)
    await session.instance.clear()


def _daemons_ms(status: Status) -> dict[str, float]:
    daemons = {"controller": status.controller, "hostd": status.hostd, "pager": status.pager}
    return {name: cpu_ms(daemon.pid) if daemon is not None else 0.0 for name, daemon in daemons.items()}


def _spent(before: dict[str, float], status: Status, fork: Fork) -> dict[str, float]:
    """CPU time in ms that the fork has used, by whom: the daemons, and the children's QEMU processes since their
    start. What is left of cores times time is the parent's, this benchmark's, and the kernel's."""
    spent = {name: after - before[name] for name, after in _daemons_ms(status).items()}
    spent["children's QEMU"] = sum(cpu_ms(child.info.qemu_pid) for child in fork.children if child.info.qemu_pid)
    return spent
