"""A child of a child of a child: pause and time to ready. And one parent that is forked again and again."""

from bench.session import Session
from bench.splits import record, split_often

SECTION = "generations"
REPEATED = "repeated"
DEEPEST = 8


async def run(session: Session) -> None:
    """Several chains, so that the host's moods do not look like an effect of the generation."""
    pauses: dict[int, list[float]] = {number: [] for number in range(1, DEEPEST + 1)}
    ready: dict[int, list[float]] = {number: [] for number in range(1, DEEPEST + 1)}
    for _ in range(session.times(8, 1)):
        machine = await session.forky.run()
        for generation in range(1, DEEPEST + 1):
            fork = await machine.fork(1)
            machine = fork.children[0]
            pauses[generation].append(fork.pause_ms)
            ready[generation].append(machine.ready_ms or 0.0)
        await session.instance.clear()
    for generation in pauses:
        session.tell(session.results.add(SECTION, "pause", "ms", pauses[generation], generation=generation))
        session.results.add(SECTION, "child ready", "ms", ready[generation], generation=generation)
    await _repeated(session)


async def _repeated(session: Session) -> None:
    machine = await session.forky.run()
    record(session, REPEATED, await split_often(machine, session.times(40, 8)))
    await session.instance.clear()
