"""forky export, import, push, pull, gc, fsck, key create."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import SnapshotName
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkypig.sdk.client import Forky
    from forkypig.sdk.store import RemoteSnapshot, Transferred

app = typer.Typer()
keys = typer.Typer(help="Keys that exports are signed with.", no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[str, typer.Argument(metavar="URL", help="file:///DIRECTORY or s3://BUCKET/PREFIX.")]
NewTag = Annotated[str, typer.Option("--tag", "-t", metavar="TAG", help="What it is to be called here.")]


@app.command()
def export(
    snapshot: SnapshotName,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file to write; - is stdout.")],
    no_image: Annotated[bool, typer.Option("--no-image", help="Without the image that it stands on.")] = False,
    sign: Annotated[str, typer.Option("--sign", metavar="KEYFILE", help="Sign it with this secret key.")] = "",
    as_json: printing.Json = False,
) -> None:
    """Write a snapshot to a file: memory, disk, devices, and the image that it stands on.

    forky import reads it, here or elsewhere. A snapshot that is not packed yet is packed first.
    """
    if file == "-" and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("stdout can't take the file here: name one", param_hint="FILE")

    async def work(forky: "Forky") -> None:
        with Display() as display:
            done = await forky.export_snapshot(
                snapshot,
                sys.stdout.buffer if file == "-" else file,
                with_image=not no_image,
                sign=sign or None,
                on_progress=display.on_bytes_of,
            )
        if as_json:
            printing.document({"file": str(Path(file).absolute()), "bytes": done.bytes, "signed": bool(sign)})
        elif file != "-":
            printing.say(f"{snapshot} is in {file}, {sizes.human(done.bytes)}{', signed' if sign else ''}")

    connected(work)


@app.command(name="import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What forky export wrote; - is stdin.")],
    tag: NewTag = "",
    trust: Annotated[
        str, typer.Option("--trust", metavar="PUBKEY", help="Only if it is signed by the key of this .pub file.")
    ] = "",
    as_json: printing.Json = False,
) -> None:
    """Take in a snapshot that forky export wrote.

    Everything in the file is verified. A snapshot runs whatever was in its machine: import what you trust.
    """

    async def work(forky: "Forky") -> None:
        with Display() as display:
            done = await forky.import_snapshot(
                sys.stdin.buffer if file == "-" else file,
                tag=tag,
                trust=trust or None,
                on_progress=display.on_bytes_of,
            )
        _arrived(done, as_json=as_json)

    connected(work)


def _arrived(done: "Transferred", *, as_json: bool) -> None:
    if as_json:
        printing.document(_transferred(done))
        return
    called = done.snapshot.tag or done.snapshot.id
    if done.was_there:
        printing.say(f"{done.snapshot.id} is here already{f', as {done.snapshot.tag}' if done.snapshot.tag else ''}")
    else:
        printing.say(
            f"{done.snapshot.id} is here{f' as {done.snapshot.tag}' if done.snapshot.tag else ''}, "
            f"{sizes.human(done.bytes)} new: forky run --from {called}"
        )


def _transferred(done: "Transferred") -> dict[str, Any]:
    return {
        "snapshot": documents.snapshot(done.snapshot),
        "was_there": done.was_there,
        "new_chunks": done.chunks,
        "new_bytes": done.bytes,
    }


@app.command()
def push(snapshot: SnapshotName, url: Url, as_json: printing.Json = False) -> None:
    """Send a snapshot to a directory or an object store: what is not there yet.

    For s3: the keys and the endpoint are those of AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and
    AWS_ENDPOINT_URL. What was interrupted goes on where it was.
    """

    async def work(forky: "Forky") -> None:
        with Display() as display:
            done = await forky.push_snapshot(snapshot, url, on_progress=display.on_bytes_of)
        if as_json:
            printing.document(_transferred(done))
        elif done.was_there:
            printing.say(f"{done.snapshot.id} is in {url} already")
        else:
            printing.say(f"{done.snapshot.id} is in {url}, {sizes.human(done.bytes)} sent")

    connected(work)


@app.command()
def pull(
    url: Annotated[str, typer.Argument(metavar="URL[/SNAPSHOT]", help="Of a snapshot: its id or tag at the end.")],
    tag: NewTag = "",
    as_json: printing.Json = False,
) -> None:
    """Fetch a snapshot from where it was pushed to: what is not here yet. Without a name: list what is there."""

    async def work(forky: "Forky") -> None:
        place, name = await _place_and_name(forky, url)
        if not name:
            found = await forky.remote_snapshots(place)
            if as_json:
                printing.document([_remote(each) for each in found])
            else:
                _list(place, found)
            return
        with Display() as display:
            done = await forky.pull_snapshot(place, name, tag=tag, on_progress=display.on_bytes_of)
        _arrived(done, as_json=as_json)

    connected(work)


async def _place_and_name(forky: "Forky", url: str) -> tuple[str, str]:
    """Where to look, and for what: the last part of a URL is a snapshot unless snapshots were pushed to the whole."""
    from forkypig.errors import NotFound

    try:
        await forky.remote_snapshots(url)
    except NotFound:
        place, _, name = url.rstrip("/").rpartition("/")
        if not place or place.endswith("/") or not await _is_place(forky, place):
            raise
        return place, name
    return url, ""


async def _is_place(forky: "Forky", url: str) -> bool:
    from forkypig.errors import NotFound

    try:
        await forky.remote_snapshots(url)
    except NotFound:
        return False
    return True


def _list(place: str, found: "Sequence[RemoteSnapshot]") -> None:
    if not found:
        printing.say(f"Nothing is in {place} yet. Send a snapshot: forky push SNAPSHOT {place}")
        return
    rows = [
        (
            each.id,
            each.tag,
            printing.moment(each.created_us),
            sizes.human(each.own_memory_bytes),
            "here" if each.is_here else "",
            each.message.partition("\n")[0],
        )
        for each in found
    ]
    printing.table(("ID", "TAG", "TAKEN", "OWN", "", "MESSAGE"), rows)


def _remote(each: "RemoteSnapshot") -> dict[str, Any]:
    return {
        "id": each.id,
        "tag": each.tag or None,
        "message": each.message or None,
        "created_us": each.created_us,
        "own_memory_bytes": each.own_memory_bytes,
        "own_disk_bytes": each.own_disk_bytes,
        "is_here": each.is_here,
    }


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Remove from the store what no snapshot needs: of removed snapshots, of what was interrupted."""

    async def work(forky: "Forky") -> int | None:
        with Display() as display:
            done = await forky.collect(dry_run=dry_run, on_progress=display.on_bytes_of)
        if as_json:
            printing.document(
                {
                    "dry_run": dry_run,
                    "snapshots": done.snapshots,
                    "chunks_kept": done.chunks_kept,
                    "packs_removed": done.packs_removed,
                    "packs_rewritten": done.packs_rewritten,
                    "freed_bytes": done.freed_bytes,
                    "more_bytes": done.more_bytes,
                    "problems": list(done.problems),
                }
            )
        else:
            verb = "would be freed" if dry_run else "freed"
            printing.say(
                f"{sizes.human(done.freed_bytes + done.more_bytes)} {verb}, {done.snapshots} snapshots in the store"
            )
            for problem in done.problems:
                printing.trouble(problem)
        return 1 if done.problems else None

    connected(work)


@app.command()
def fsck(
    deep: Annotated[bool, typer.Option("--deep", help="Read and verify every chunk.")] = False,
    as_json: printing.Json = False,
) -> None:
    """Say whether the store has all that the snapshots need. Exit code 1 when something is damaged or missing."""

    async def work(forky: "Forky") -> int | None:
        with Display() as display:
            found = await forky.check_store(deep=deep, on_progress=display.on_bytes_of)
        if as_json:
            printing.document(
                {
                    "packs": found.packs,
                    "chunks": found.chunks,
                    "stored_bytes": found.stored_bytes,
                    "snapshots": found.snapshots,
                    "problems": [{"subject": subject, "text": text} for subject, text in found.problems],
                }
            )
        else:
            for subject, text in found.problems:
                printing.say(f"{subject}: {text}")
            state = f"{len(found.problems)} problems" if found.problems else "all is well"
            printing.say(
                f"{state}: {found.snapshots} snapshots, {found.chunks} chunks in {found.packs} packs, "
                f"{sizes.human(found.stored_bytes)}{'' if deep else '; forky fsck --deep reads every chunk'}"
            )
            if found.problems:
                printing.trouble(
                    "remove the snapshots that are named (forky rm) and collect (forky gc); what you have elsewhere "
                    "comes back by forky import or pull"
                )
        return 1 if found.problems else None

    connected(work)


@keys.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The secret key; FILE.pub is the public one.")],
    as_json: printing.Json = False,
) -> None:
    """Make a pair of keys. Sign exports with FILE; whoever is to trust them needs FILE.pub."""
    from forkypig import signatures

    public = signatures.create(file)
    if as_json:
        printing.document({"secret": str(file), "public": f"{file}.pub", "key": public.hex()})
    else:
        printing.say(f"keep {file} to yourself, give {file}.pub to whoever is to trust what you sign")
