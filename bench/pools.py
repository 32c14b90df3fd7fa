"""Acquiring machines of a pool: one after the other while refills run, and two hundred at once on a pool of twenty."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

from bench.instance import checked, instance
from bench.session import Session
from forkypig import errors
from forkypig.model import ConfigChange
from forkypig.sdk.pools import AcquiredMachine, Pool
from tests.component.postgres_rig import postgres

SECTION = "pools"
CROWD = "pools, a crowd"
IMAGE = "debian-12"
_FILL_S = 600.0
_LOOK_S = 0.05
_WAIT_S = 1800.0


async def run(session: Session) -> None:
    """Both, on pools of their own; one by one also with PostgreSQL."""
    await one_by_one(session, "SQLite", target=10, times=session.times(120, 15))
    with postgres(durable=True) as server:
        async with instance(database=server.url("postgres")) as other:
            there = replace(session, instance=other)
            await one_by_one(there, "PostgreSQL", target=10, times=session.times(60, 15))
    await crowd(session, size=20 if not session.quick else 4, callers=200 if not session.quick else 12)


async def one_by_one(session: Session, engine: str, *, target: int, times: int) -> None:
    """Each is acquired while the refill for the last one runs, and used at once; also from an idle pool."""
    forky, results = session.forky, session.results
    await forky.create_pool("bench", IMAGE, target=target, max=3 * target)
    pool = forky.pool("bench")
    for load in ("idle", "refilling"):
        samples: list[float] = []
        execs: list[float] = []
        held: list[AcquiredMachine] = []
        for number in range(times):
            await _ready(pool, target if load == "idle" else 2)
            began = time.perf_counter()
            machine = await pool.acquire(wait_s=_WAIT_S)
            samples.append((time.perf_counter() - began) * 1000)
            if number % 10 == 0:
                await checked(machine, "true")
                execs.append((time.perf_counter() - began) * 1000)
            held.append(machine)
            if len(held) > target:
                await held.pop(0).release()
        for machine in held:
            await machine.release()
        session.tell(results.add(SECTION, "acquire of a ready machine", "ms", samples, engine=engine, pool=load))
        session.tell(results.add(SECTION, "acquire, and exec of true in it", "ms", execs, engine=engine, pool=load))
    runs = []
    for _ in range(session.times(15, 4)):
        await _ready(pool, target)
        made = await forky.run(config=ConfigChange(), name=f"named-{len(runs)}")
        runs.append(made.ready_ms or 0.0)
        await made.remove()
    session.tell(results.add(SECTION, "run --name from a pool", "ms", runs, engine=engine))
    await pool.remove()
    await session.instance.clear()


async def _ready(pool: Pool, count: int) -> None:
    async with asyncio.timeout(_FILL_S):
        while True:
            status = await pool.status()
            if status.ready >= count and (count < status.pool.target or not status.filling):
                return
            await asyncio.sleep(_LOOK_S)


async def crowd(session: Session, *, size: int, callers: int) -> None:
    """All come at once; each gives its machine back at once, to be recycled. Raises what is no deadline."""
    await session.forky.create_pool("crowd", IMAGE, target=size, max=size)
    pool = session.forky.pool("crowd")
    await _ready(pool, size)
    served: list[AcquiredMachine] = []
    late = 0

    async def one() -> None:
        nonlocal late
        try:
            machine = await pool.acquire(wait_s=_WAIT_S)
        except errors.ResourceExhausted:
            late += 1
            return
        served.append(machine)
        await machine.release(recycle=True)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(callers)))
    took_ms = (time.perf_counter() - began) * 1000
    results = session.results
    session.tell(
        results.add(
            CROWD, "wait in the queue", "ms", [machine.waited_ms for machine in served], callers=callers, size=size
        )
    )
    session.tell(results.add(CROWD, "until all were served", "ms", [took_ms], callers=callers, size=size))
    results.add(CROWD, "callers past their deadline", "", [float(late)], callers=callers, size=size)
    overtaken = out_of_turn(served)
    results.add(CROWD, "callers given a machine before one who came earlier", "", [float(overtaken)], callers=callers)
    session.say(f"{CROWD}: {len(served)} served, {late} past their deadline, {overtaken} out of turn")
    await pool.remove()
    await session.instance.clear()


def out_of_turn(served: Sequence[AcquiredMachine]) -> int:
    """How many were given a machine before somebody who had come to the controller earlier, by its own clock. Those who
    are answered later are not: how long a host takes to let a machine run has nothing to do with whose turn it is."""
    in_turn = sorted(served, key=lambda machine: machine.arrived_us)
    given = [machine.arrived_us + machine.waited_ms * 1000 for machine in in_turn]
    return sum(later < earlier for earlier, later in itertools.pairwise(given))
