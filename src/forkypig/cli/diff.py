"""forky diff."""

from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import SourceName
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.model import MemoryDiff
    from forkypig.sdk.client import Forky
    from forkypig.sdk.diff import FileChange

app = typer.Typer()

_MOST_RANGES = 10


@app.command()
def diff(
    before: SourceName,
    after: SourceName,
    stat: Annotated[bool, typer.Option("--stat", help="Show how each file changed, and where memory did.")] = False,
    patch: Annotated[bool, typer.Option("--patch", "-p", help="Show what changed in text files, as git does.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Show what changed between two snapshots or machines: memory and files.

    A child of each is started and looked into, and removed again. Both snapshots are packed for it. What every child is
    given anew (hostname, machine-id) is left out.
    """

    async def work(forky: "Forky") -> None:
        with Display() as display:
            found = await forky.diff(before, after, patch=patch, on_progress=display.on_progress)
        if as_json:
            printing.document(documents.diff(found))
            return
        for change in found.files:
            printing.say(_line(change, stat=stat))
        for change in found.files:
            if change.patch:
                printing.say("\n" + change.patch.removesuffix("\n"))
        counts = {verb: sum(change.verb == verb for change in found.files) for verb in "AMD"}
        printing.say(f"files: {counts['A']} added, {counts['M']} changed, {counts['D']} removed")
        _memory(found.memory, stat=stat)

    connected(work)


def _line(change: "FileChange", *, stat: bool) -> str:
    line = f"{change.verb} {change.path}"
    if not stat:
        return line
    old, new = change.before, change.after
    line += f"  {sizes.human(old.size_bytes if old else 0)} -> {sizes.human(new.size_bytes if new else 0)}"
    if old is None or new is None:
        return line
    for what, was, now in (
        ("kind", old.kind, new.kind),
        ("mode", f"{old.mode:o}", f"{new.mode:o}"),
        ("owner", f"{old.uid}:{old.gid}", f"{new.uid}:{new.gid}"),
        ("target", old.target, new.target),
    ):
        if was != now:
            line += f", {what} {was} -> {now}"
    return line


def _memory(memory: "MemoryDiff", *, stat: bool) -> None:
    share = 100 * memory.pages / memory.total_pages
    size = sizes.human(memory.pages * 4096)
    printing.say(f"memory: {memory.pages} of {memory.total_pages} pages differ ({size}, {share:.1f} %)")
    if stat:
        largest = sorted(memory.ranges, key=lambda each: -each[1])[:_MOST_RANGES]
        for address, length in sorted(largest):
            printing.say(f"  {address:#014x}  {sizes.human(length)}")
        if len(memory.ranges) > len(largest):
            printing.say(f"  and {len(memory.ranges) - len(largest)} smaller ranges")
