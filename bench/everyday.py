"""What a user waits for every day: a run from the template, a command in a machine, the tool itself."""

import asyncio
import sys
import time
from pathlib import Path

from bench.instance import checked
from bench.session import Session
from forkypig.errors import NotPossibleNow

SECTION = "everyday"
_COMMAND_S = 120.0


async def run(session: Session) -> None:
    """Through the SDK, and through the command line with its own start."""
    results = session.results
    await session.forky.run()  # from here on there is a template with a shell ready
    warm = []
    for _ in range(session.times(15, 4)):
        await asyncio.sleep(1)  # a ready shell is started again in the background
        warm.append((await session.forky.run()).ready_ms or 0.0)
    session.tell(results.add(SECTION, "run from the template (SDK)", "ms", warm))
    machine = (await session.forky.list())[0]
    execs = []
    for _ in range(session.times(40, 10)):
        began = time.perf_counter()
        await checked(machine, "true")
        execs.append((time.perf_counter() - began) * 1000)
    session.tell(results.add(SECTION, "exec of true (SDK)", "ms", execs))
    for title, times, arguments in (
        ("forky --help", session.times(20, 8), ["--help"]),
        ("forky run", session.times(8, 2), ["run"]),
        ("forky exec NAME -- true", session.times(8, 2), ["exec", machine.name, "--", "true"]),
    ):
        samples = []
        for _ in range(times):
            await asyncio.sleep(0.3)
            samples.append(await _command_ms(session, arguments))
        session.tell(results.add(SECTION, title, "ms", samples))
    await session.instance.clear()


async def _command_ms(session: Session, arguments: list[str]) -> float:
    """Wall time of one `forky` command. Raises NotPossibleNow when it fails."""
    installed = Path(sys.executable).with_name("forky")
    tool = [str(installed)] if installed.exists() else [sys.executable, "-m", "forkypig.cli"]
    began = time.perf_counter()
    child = await asyncio.create_subprocess_exec(
        *tool, *arguments, env=session.instance.environment, stdout=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(_COMMAND_S):
        code = await child.wait()
    if code != 0:
        raise NotPossibleNow(f"forky {' '.join(arguments)} failed with exit code {code}: its message is above")
    return (time.perf_counter() - began) * 1000
