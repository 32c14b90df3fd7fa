"""A Forky Pig of the benchmark's own: a home in a temporary directory, its daemons, its machines, its end."""

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.processes import calm
from forkypig import errors
from forkypig.daemon.settings import Settings
from forkypig.model import SnapshotKind
from forkypig.sdk import shutdown
from forkypig.sdk.client import Forky
from forkypig.sdk.machine import Machine

CHECKOUT = Path(__file__).parents[1]
_GUEST = Path(__file__).parent / "guest"
_GONE_S = 30.0


class Instance:
    """One home whose daemons run."""

    def __init__(self, forky: Forky) -> None:
        self.forky = forky
        self.settings = Settings(home=forky.place.home)

    @property
    def environment(self) -> dict[str, str]:
        """For `forky` commands on this home."""
        return {**os.environ, "FORKY_HOME": str(self.settings.home)}

    async def start_program(self, machine: Machine, program: str, *arguments: str) -> None:
        """Starts a program of bench/guest in a machine, in the background."""
        path = f"/root/{program}.py"
        await machine.write_file(path, (_GUEST / f"{program}.py").read_bytes())
        words = " ".join(["setsid", "python3", path, *arguments])
        await checked(machine, "sh", "-c", f"{words} </dev/null >/dev/null 2>/root/{program}.err &")

    async def clear(self) -> None:
        """Removes all machines and snapshots but the templates, and waits until the host is calm.

        Raises DeadlineExceeded when snapshots stay that nothing needs."""
        removals = [machine.remove() for machine in await self.forky.list()]
        for outcome in await asyncio.gather(*removals, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, errors.NotFound):
                raise outcome
        deadline = time.monotonic() + _GONE_S
        while left := [s for s in await self.forky.snapshots() if s.kind is not SnapshotKind.TEMPLATE]:
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"{len(left)} snapshots stay although no machine does: {left[0].id}, …")
            for snapshot in reversed(left):
                # Those of forks go by themselves; a kept one can go when the ones above it have gone.
                if snapshot.kind is SnapshotKind.KEPT:
                    with contextlib.suppress(errors.NotPossibleNow, errors.NotFound):
                        await self.forky.remove_snapshot(snapshot.id)
            await asyncio.sleep(0.05)
        await calm()


async def checked(machine: Machine, *argv: str) -> str:
    """What a command in a machine printed, stripped. Raises MachineFailed when it fails."""
    done = await machine.exec(list(argv), timeout_s=120)
    if done.exit_code != 0:
        words = done.failure or done.stderr.decode(errors="replace").strip()[-300:]
        raise errors.MachineFailed(f"{argv[0]} in machine «{machine.name}» failed ({done.exit_code}): {words}")
    return done.stdout.decode().strip()


@contextlib.asynccontextmanager
async def instance(*, pack: bool = False, database: str = "") -> AsyncIterator[Instance]:
    """Starts daemons in a fresh home with the checkout's images; at the end nothing of it is left.

    `pack`: snapshots are packed in the background, which disturbs what else is measured. `database`: PostgreSQL's URL
    ("": SQLite)."""
    images = CHECKOUT / ".cache/images"
    images.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="forky-bench-"))
    (home / "images").symlink_to(images)
    os.environ["FORKY_PACK_IN_BACKGROUND"] = str(pack)  # read by the daemons that we start
    os.environ["FORKY_DATABASE"] = database
    forky = Forky(home)
    try:
        await forky.connect()
        await forky.build_image()
        here = Instance(forky)
        yield here
        await here.clear()
        for snapshot in await forky.snapshots():  # templates: `down` would write them to files first
            await forky.remove_snapshot(snapshot.id)
    finally:
        await asyncio.shield(_end(forky))


async def _end(forky: Forky) -> None:
    await forky.close()
    await shutdown.down(forky.place, force=True)
    await asyncio.to_thread(shutil.rmtree, forky.place.home, ignore_errors=True)
