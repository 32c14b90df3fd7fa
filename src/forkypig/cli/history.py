"""forky log, tag, restore, hibernate, wake, bisect."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import MachineName, SnapshotName, SourceName
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected
from forkypig.model import Progress

if TYPE_CHECKING:
    from forkypig import model
    from forkypig.sdk.bisect import Bisected, Trial
    from forkypig.sdk.client import Forky

app = typer.Typer()


@app.command()
def log(source: SourceName, as_json: printing.Json = False) -> None:
    """Show what a machine or a snapshot stands on, newest first.

    OWN is what a snapshot's memory has that its parent's has not, DISK what was written to its disk since.
    """

    async def work(forky: "Forky") -> None:
        chain = await forky.history(source)
        if as_json:
            printing.document([documents.snapshot(each) for each in chain])
        elif not chain:
            printing.say(f"{source} stands on no snapshot. Take one: forky snapshot {source} --tag first")
        else:
            _table(chain)

    connected(work)


def _table(chain: "Sequence[model.Snapshot]") -> None:
    rows = [
        (
            each.id,
            each.tag,
            each.kind.value,
            printing.moment(each.created_us),
            sizes.human(each.own_memory_bytes) if each.packed else "",
            sizes.human(each.own_disk_bytes),
            where(each),
            each.message.partition("\n")[0],
        )
        for each in chain
    ]
    printing.table(("ID", "TAG", "KIND", "TAKEN", "OWN", "DISK", "WHERE", "MESSAGE"), rows)


def where(snapshot: "model.Snapshot") -> str:
    """Where its memory is."""
    return "packed" if snapshot.packed else "in memory"


@app.command()
def tag(
    snapshot: Annotated[
        str, typer.Argument(metavar="[SNAPSHOT]", help="A snapshot's id, the beginning of one, or its tag.")
    ] = "",
    new_tag: Annotated[str, typer.Argument(metavar="[NEW_TAG]", help="What it is to be called.")] = "",
    delete: Annotated[str, typer.Option("--delete", metavar="TAG", help="Take a tag away; its snapshot stays.")] = "",
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Take the tag from another snapshot; replace one that it has.")
    ] = False,
    as_json: printing.Json = False,
) -> None:
    """Give a snapshot a tag; list the tags.

    A snapshot has one tag at a time, and is kept from then on, until it is removed (forky rm).
    """
    if delete and (snapshot or new_tag):
        raise typer.BadParameter("--delete takes the tag alone", param_hint="--delete")
    if snapshot and not new_tag:
        raise typer.BadParameter("say what the snapshot is to be called", param_hint="NEW_TAG")

    async def work(forky: "Forky") -> None:
        if not delete and not snapshot:
            tagged = sorted((each for each in await forky.snapshots() if each.tag), key=lambda each: each.tag)
            if as_json:
                printing.document([documents.snapshot(each) for each in tagged])
            elif not tagged:
                printing.say("There is no tag yet. Take a snapshot with one: forky snapshot MACHINE --tag good")
            else:
                rows = [
                    (each.tag, each.id, printing.moment(each.created_us), each.message.partition("\n")[0])
                    for each in tagged
                ]
                printing.table(("TAG", "SNAPSHOT", "TAKEN", "MESSAGE"), rows)
            return
        changed = await (forky.untag(delete) if delete else forky.tag(snapshot, new_tag, force=force))
        if as_json:
            printing.document(documents.snapshot(changed))
        else:
            printing.say(f"{changed.id} is {changed.tag}" if changed.tag else f"{changed.id} has no tag now; it stays")

    connected(work)


@app.command()
def restore(
    machine: MachineName,
    snapshot: SnapshotName,
    keep: Annotated[
        str, typer.Option("--snapshot", metavar="TAG", help="First keep what it is now, under this tag.")
    ] = "",
    as_json: printing.Json = False,
) -> None:
    """Put a machine back to a snapshot, in place.

    Memory and disk are what they were then; id, name, address, published ports and config stay as they are. What the
    machine was is gone for ever, unless you keep it: --snapshot TAG. Then it runs, with new random numbers and the
    right time; TCP connections that it had are reset. If it can't be done the machine goes on as it was.
    """

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        with Display() as display:
            display.on_progress(Progress("restoring"))
            await found.restore(snapshot, keep_tag=keep)
        if as_json:
            printing.document(documents.machine(found.info))
        else:
            kept = f"; what it was is kept as {keep}" if keep else ""
            printing.say(f"{found.name} is what it was at {snapshot}{kept}")

    connected(work)


@app.command()
def hibernate(machine: MachineName, as_json: printing.Json = False) -> None:
    """Write a machine's memory to disk and end its QEMU; forky wake lets it go on.

    It holds no memory of the host in between, and keeps its name, address and ports.
    """

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        with Display() as display:
            display.on_bytes_of(Progress("packing"))
            await found.hibernate(on_progress=display.on_bytes_of)
        if as_json:
            printing.document(documents.machine(found.info))
        else:
            printing.say(f"{found.name} hibernates in {found.info.snapshot}: forky wake {found.name}")

    connected(work)


@app.command()
def wake(machine: MachineName, as_json: printing.Json = False) -> None:
    """Let a hibernated machine go on where it was."""

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        with Display() as display:
            display.on_progress(Progress("waking"))
            await found.wake()
        if as_json:
            printing.document(documents.machine(found.info))
        else:
            printing.say(f"{found.name} runs")

    connected(work)


@app.command()
def bisect(
    context: typer.Context,
    source: SourceName,
    good: Annotated[str, typer.Option("--good", metavar="SNAPSHOT", help="The last that is known to be good.")],
    bad: Annotated[
        str, typer.Option("--bad", metavar="SNAPSHOT", help="The first that is known to be bad; else the newest.")
    ] = "",
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0, metavar="S", help="Of each run; what takes longer is bad.")
    ] = 0.0,
    as_json: printing.Json = False,
) -> None:
    """Find the first bad snapshot: run `-- COMMAND` in children of those between.

    Exit code 0 means good, 125 that this one can't be judged, others bad. Each child is removed after its run. The
    exit code is 0 when the first bad one was found, 2 when skipped ones hide it.
    """
    command: list[str] = context.obj or []
    if not command:
        raise typer.BadParameter("no command is given: write it after «--»", param_hint="COMMAND")

    async def work(forky: "Forky") -> int | None:
        with Display() as display:
            display.on_progress(Progress(f"bisecting: {' '.join(command)}"))

            def tried(trial: "Trial") -> None:
                if not as_json:
                    printing.say(
                        f"{trial.snapshot.id}  {trial.verdict.value:<4}  {_called(trial.snapshot)}  "
                        f"exit code {trial.exit_code}, about {trial.left} more to try"
                    )

            found = await forky.bisect(source, command, good=good, bad=bad, timeout_s=timeout_s, on_trial=tried)
        if as_json:
            printing.document(_bisected(found))
        elif found.first_bad is not None:
            printing.say(f"the first bad snapshot is {found.first_bad.id}  {_called(found.first_bad)}")
        else:
            printing.say("the first bad snapshot is one of these, as the others could not be judged:")
            _table(found.suspects[::-1])
        return None if found.first_bad is not None else 2

    connected(work)


def _called(snapshot: "model.Snapshot") -> str:
    """What a person calls it."""
    return "  ".join(word for word in (snapshot.tag, snapshot.message.partition("\n")[0]) if word) or "-"


def _bisected(found: "Bisected") -> documents.Document:
    return {
        "first_bad": documents.snapshot(found.first_bad) if found.first_bad is not None else None,
        "suspects": [each.id for each in found.suspects],
        "trials": [
            {
                "snapshot": trial.snapshot.id,
                "tag": trial.snapshot.tag or None,
                "verdict": trial.verdict.value,
                "exit_code": trial.exit_code,
                "output": trial.output.decode(errors="replace"),
            }
            for trial in found.trials
        ],
    }
