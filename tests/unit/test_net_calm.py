"""Pauses and steps of work: never at the same time, and pauses go first. The order of events, without a clock."""

import asyncio

from forkypig.net.calm import Calm


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_pauses_and_steps() -> None:
    calm, events = Calm(), list[str]()
    gates = {name: asyncio.Event() for name in ("step1", "pause1", "pause2", "step2")}

    async def run(name: str) -> None:
        async with calm.step() if name.startswith("step") else calm.pause():
            events.append(f"+{name}")
            await gates[name].wait()
        events.append(f"-{name}")

    tasks = []
    for name in ("step1", "pause1", "step2", "pause2"):
        tasks.append(asyncio.create_task(run(name)))
        await _settle()
    assert events == ["+step1"]  # the pauses wait for it, the second step for them
    gates["step1"].set()
    await _settle()
    assert sorted(events[1:]) == ["+pause1", "+pause2", "-step1"]
    gates["pause1"].set()
    await _settle()
    assert "+step2" not in events
    gates["pause2"].set()
    await _settle()
    assert events[-1] == "+step2"
    gates["step2"].set()
    await asyncio.gather(*tasks)


async def test_who_gives_up_waiting_holds_nobody_up() -> None:
    calm = Calm()

    async def pause() -> None:
        async with calm.pause():
            raise AssertionError("began in the middle of a step")

    async with calm.step():
        waiting = asyncio.create_task(pause())
        await _settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(30), calm.step():
        pass
    async with asyncio.timeout(30), calm.pause():
        pass
