"""`make demo`: boots a machine, lets a program in it build up state, forks the running machine into eight children,
and proves that each inherited memory and files and then goes its own way.

FORKY_HOME chooses where; by default it is a directory of the checkout's cache, so that a second run finds the
template there. Nothing is left running. Exits with 1 when a proof fails.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.tree import Tree

from forkypig import errors, model
from forkypig.daemon.home import Home, HomePaths
from forkypig.sdk import local, shutdown
from forkypig.sdk.client import Forky
from forkypig.sdk.machine import Fork, Machine

CACHE = Path(__file__).parents[1] / ".cache"
PROGRAM = Path(__file__).with_name("demo_program.py")
GUEST_PROGRAM = "/root/demo_program.py"
CHILDREN = 8
MEMORY_MIB = 512
WORDS = ("acorn", "birch", "clover", "daisy", "elder", "fern", "gorse", "hazel")
State = dict[str, Any]
console = Console(highlight=False)


@dataclass(slots=True)
class Proofs:
    """What was checked, and whether it held."""

    found: list[tuple[str, bool]] = field(default_factory=list)

    def check(self, name: str, holds: bool) -> None:
        self.found.append((name, holds))

    def show(self) -> bool:
        """Prints them all; whether all hold."""
        for name, holds in self.found:
            console.print(f"  {'[green]✓[/]' if holds else '[bold red]✗ FAILED:[/]'} {name}")
        return all(holds for _, holds in self.found)


@contextlib.contextmanager
def bar(title: str, total: int | None = None) -> Iterator["Bar"]:
    """A progress bar while the block runs; it pulses where the total is not known."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total))


@dataclass(slots=True)
class Bar:
    """One task of a progress display."""

    progress: Progress
    task: TaskID

    def follow(self, step: model.Progress) -> None:
        """For the SDK's on_progress."""
        self.progress.update(self.task, description=step.step, completed=step.done, total=step.total or None)

    def advance(self) -> None:
        self.progress.advance(self.task)


def done(text: str) -> None:
    console.print(f"[green]✓[/] {text}")


# -- where it runs


@contextlib.asynccontextmanager
async def daemons() -> AsyncIterator[Forky]:
    """Connects to a home whose daemons run; afterwards all is as it was before."""
    home, temporary = _home()
    place = local.place(home)
    ran = local.all_run(place)
    forky = Forky(home)
    try:
        with bar("starting the daemons", len(local.DAEMONS)) as progress:
            await local.up(place, progress.follow)
        await forky.connect()
        yield forky
    finally:
        await asyncio.shield(_end(forky, place, ran, temporary))


async def _end(forky: Forky, place: HomePaths, ran: bool, temporary: bool) -> None:
    await forky.close()
    if not ran:
        with bar("shutting down") as progress:
            await shutdown.down(place, progress.follow)
    if temporary:
        await asyncio.to_thread(shutil.rmtree, place.home, ignore_errors=True)


def _home() -> tuple[Path, bool]:
    """The directory, with the checkout's images in it, and whether it goes at the end."""
    given = os.environ.get("FORKY_HOME")
    home, temporary = Path(given) if given else CACHE / "demo", False
    try:
        Home(home).check()
    except ValueError as error:
        if given:
            raise errors.InvalidRequest(str(error)) from error
        home, temporary = Path(tempfile.mkdtemp(prefix="forky-demo-")), True
    images = home / "images"
    if not images.is_dir():
        (CACHE / "images").mkdir(parents=True, exist_ok=True)
        local.make_home(Home(home))
        images.symlink_to(CACHE / "images")
    return home, temporary


def leftovers(place: HomePaths) -> list[str]:
    """Daemons, QEMU processes and mounts of a home that was shut down; none if its daemons run."""
    if local.all_run(place):
        return []
    mark, found = os.fsencode(place.home), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = (entry / "cmdline").read_bytes()
            daemon = b"forkypig." in command and b"FORKY_HOME=" + mark + b"\0" in (entry / "environ").read_bytes()
            if daemon or (b"qemu" in command and mark in command):
                found.append(f"process {entry.name}")
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return found + [line.split()[1] for line in mounts if str(place.home) in line]


# -- the machine and what runs in it


async def prepare(forky: Forky) -> Machine:
    """Image, machine, program. A machine of an earlier run that was cut short goes first."""
    status = await forky.status()
    done(f"daemons run; QEMU {status.qemu_version.split()[0]} under {(status.accelerator or 'nothing').upper()}")
    there = {image.id for image in await forky.images()}
    with bar("looking for the image") as progress:
        image = await forky.build_image(on_progress=progress.follow)
    how = "was there" if image.id in there else "built"
    done(f"image {image.name} {how}: {image.size_bytes >> 20} MiB, Linux {image.kernel}")
    for machine in await forky.list():
        if machine.name == "pig" or machine.name.startswith("pig-"):
            await machine.remove()
    with bar("starting a machine") as progress:
        pig = await forky.run(image.id, name="pig", memory_mib=MEMORY_MIB, on_progress=progress.follow)
    done(f"machine «{pig.name}» with {MEMORY_MIB} MiB is ready after {pig.ready_ms or 0:.0f} ms")
    return pig


async def start_program(pig: Machine) -> State:
    """Starts the program in the machine and returns what it holds."""
    with bar("starting a program in it"):
        await pig.write_file(GUEST_PROGRAM, PROGRAM.read_bytes())
        start = f"setsid python3 {GUEST_PROGRAM} serve </dev/null >/root/demo.log 2>&1 &"
        wait = "until [ -S /run/demo.sock ]; do sleep 0.1; done"
        await _run(pig, "sh", "-c", f"{start} {wait}")
        state = await ask(pig)
    done(f"a program in it holds 20 MiB of random data and the token {state['token'][:8]}… in memory,")
    console.print(f"  counts ({state['count']} by now), and keeps a journal on disk ({state['journal_bytes']} bytes)")
    return state


async def ask(machine: Machine, **request: object) -> State:
    """What the program in a machine holds, after it has been told the request's `word`."""
    found: State = json.loads(await _run(machine, "python3", GUEST_PROGRAM, "ask", json.dumps(request)))
    return found


async def ask_all(title: str, machines: list[Machine], requests: list[dict[str, object]]) -> list[State]:
    """All of them at once."""
    with bar(title, len(machines)) as progress:

        async def one(machine: Machine, request: dict[str, object]) -> State:
            state = await ask(machine, **request)
            progress.advance()
            return state

        return list(await asyncio.gather(*map(one, machines, requests)))


async def _run(machine: Machine, *argv: str) -> str:
    result = await machine.exec(list(argv), timeout_s=60)
    if result.exit_code != 0:
        words = result.failure or result.stderr.decode(errors="replace").strip()[-500:]
        raise errors.MachineFailed(f"{argv[0]} in machine «{machine.name}» failed ({result.exit_code}): {words}")
    return result.stdout.decode()


# -- the proof


def check_inherited(proofs: Proofs, before: State, states: list[State]) -> None:
    """What the children have of the parent."""
    everyone = f"all {len(states)} children"
    proofs.check(
        f"memory: {everyone} hold the token and the same 20 MiB, which no file has",
        all((state["token"], state["table"]) == (before["token"], before["table"]) for state in states),
    )
    proofs.check(
        f"in {everyone} the same process (pid {before['pid']}) goes on from where it was",
        all(state["pid"] == before["pid"] and state["count"] > before["count"] for state in states),
    )
    proofs.check(
        f"files: {everyone} have the journal of before the fork, to the byte",
        all(state["journal"] == before["journal"] for state in states),
    )


def check_apart(proofs: Proofs, names: list[str], before: State, first: list[State], told: list[State]) -> None:
    """What each child has for itself."""
    words = list(WORDS)
    proofs.check(
        "each was told another word and knows that alone, in memory and on disk",
        [state["word"] for state in told] == words
        and [state["told_in_journal"] for state in told] == [[word] for word in words],
    )
    tables = {state["table"] for state in told}
    proofs.check("their tables are all different now", len(tables) == len(told) and before["table"] not in tables)
    randoms = [state["random"] for state in (*first, *told)]
    proofs.check("/dev/urandom never gave two of them the same bytes", len(set(randoms)) == len(randoms))
    proofs.check("each has its own hostname", [state["hostname"] for state in told] == names)
    moved = [after["count"] > start["count"] for start, after in zip(first, told, strict=True)]
    proofs.check("each goes on counting for itself", all(moved))


def check_parent(proofs: Proofs, before: State, after: State) -> None:
    """The parent has noticed nothing."""
    proofs.check(
        "the parent went on, and nothing that its children were told reached it",
        after["count"] > before["count"]
        and (after["token"], after["table"], after["journal"], after["word"], after["told_in_journal"])
        == (before["token"], before["table"], before["journal"], "", []),
    )


# -- what is shown


def show_tree(pig: Machine, fork: Fork) -> None:
    tree = Tree(f"snapshot {fork.snapshot.id}: the instant of the fork")
    tree.add(f"[bold]{pig.name}[/] {pig.id}: the parent, which goes on")
    for child in fork.children:
        tree.add(f"[bold cyan]{child.name}[/] {child.id}")
    console.print(tree)


def show_children(fork: Fork, told: list[State], memory_mib: list[float]) -> None:
    table = Table("child", "ready after", "told", "table now", "count", "urandom", "host memory")
    for number in (1, 4, 6):
        table.columns[number].justify = "right"
    for child, state, mib in zip(fork.children, told, memory_mib, strict=True):
        table.add_row(
            child.name,
            f"{child.ready_ms or 0:.0f} ms",
            state["word"],
            state["table"][:8] + "…",
            str(state["count"]),
            state["random"][:8] + "…",
            f"{mib:.0f} MiB",
        )
    console.print(table)


def pss_mib(machine: Machine) -> float:
    """The machine's share of host memory: pages that n processes share count a nth in each."""
    for line in Path(f"/proc/{machine.info.qemu_pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise errors.MachineFailed(f"machine «{machine.name}» has no QEMU process: see its log")


async def demonstrate(forky: Forky) -> bool:
    """The whole story; whether every proof held."""
    proofs = Proofs()
    pig = await prepare(forky)
    try:
        await start_program(pig)
        before = await ask(pig)
        with bar(f"forking into {CHILDREN} children"):
            fork = await pig.fork(CHILDREN)
        children = list(fork.children)
        ready = [child.ready_ms or 0.0 for child in children]
        done(f"forked while it ran: the parent stood still for [bold]{fork.pause_ms:.1f} ms[/];")
        console.print(f"  the first child was ready after {min(ready):.0f} ms, all after {max(ready):.0f} ms")
        await pig.refresh()
        proofs.check(
            "parent and children stand on the same snapshot",
            {pig.info.snapshot, *(child.info.snapshot for child in children)} == {fork.snapshot.id},
        )
        memory_mib = [pss_mib(child) for child in children]
        known: dict[str, object] = {"journal_bytes": before["journal_bytes"]}
        first = await ask_all("asking the children what they inherited", children, [known] * CHILDREN)
        check_inherited(proofs, before, first)
        told = await ask_all("telling each another word", children, [{"word": word} for word in WORDS])
        check_apart(proofs, [child.name for child in children], before, first, told)
        check_parent(proofs, before, await ask(pig, **known))
        show_tree(pig, fork)
        show_children(fork, told, memory_mib)
        console.print(
            f"A child of this machine of {MEMORY_MIB} MiB costs {statistics.median(memory_mib):.0f} MiB of host memory "
            f"(PSS),\nall {CHILDREN} together {sum(memory_mib):.0f} MiB."
        )
    finally:
        await asyncio.shield(_remove(forky))
    return proofs.show()


async def _remove(forky: Forky) -> None:
    """The demo's machines; others in a home that was given stay."""
    with bar("removing the machines"):
        ours = [machine for machine in await forky.list() if machine.name == "pig" or machine.name.startswith("pig-")]
        await asyncio.gather(*(machine.remove() for machine in ours))


async def main() -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with daemons() as forky:
        holds = await demonstrate(forky)
    if left := leftovers(forky.place):
        console.print(f"  [bold red]✗ FAILED:[/] something is left: {', '.join(left)}")
        return 1
    done("nothing is left running" if not local.all_run(forky.place) else "the daemons, which ran before, run on")
    return 0 if holds else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except errors.ForkyError as error:
        console.print(f"[bold red]the demo broke off:[/] {error}", markup=True)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; nothing is left running")
        sys.exit(130)
