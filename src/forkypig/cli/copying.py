"""forky cp."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import printing, sizes
from forkypig.cli.progress import Display
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.sdk.transfer import Copied

app = typer.Typer()
# A tar archive says a file's size before its bytes, so what comes from a pipe is kept until it ends: small here.
_IN_MEMORY_BYTES = 8 << 20


def place(text: str) -> tuple[str | None, str]:
    """(machine, path) of MACHINE:PATH, or (None, path): a colon after a slash, as in ./a:b, belongs to the path."""
    machine, colon, path = text.partition(":")
    if not colon or "/" in machine or not machine:
        return None, text
    return machine, path


@app.command()
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="PATH or MACHINE:PATH; - is standard input.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="PATH or MACHINE:PATH; - is standard output.")],
    as_json: printing.Json = False,
) -> None:
    """Copy a file or a tree into a machine or out of it.

    As cp does: into DST if that is a directory, else as DST. Paths in a machine are absolute. What a machine sends
    is never written outside of DST. A file has its name when it is whole, and replaces what is there then.
    """
    (from_machine, from_path), (to_machine, to_path) = place(source), place(target)
    if (from_machine is None) == (to_machine is None):
        raise typer.BadParameter("one of SRC and DST must be MACHINE:PATH, and the other not", param_hint="DST")
    if as_json and to_path == "-" and to_machine is None:
        raise typer.BadParameter("standard output can't be the copy and the document: leave out one", param_hint="DST")

    async def work(forky: "Forky") -> int | None:
        display = Display().copying(source)
        with display:
            if from_machine is not None:
                copied = await _out(forky, display, from_machine, from_path, to_path)
            else:
                copied = await _in(forky, display, from_path, to_machine or "", to_path)
        return _report(copied, quiet=to_machine is None and to_path == "-", as_json=as_json)

    connected(work)


async def _out(forky: "Forky", display: Display, machine: str, path: str, target: str) -> "Copied":
    from forkypig.sdk.transfer import Copied

    found = await forky.get(machine)
    if target != "-":
        return await found.download(path, target, on_bytes=display.on_bytes)
    sys.stdout.flush()
    count = await found.download_into(path, sys.stdout.buffer, on_bytes=display.on_bytes)
    sys.stdout.buffer.flush()
    return Copied(1, count)


async def _in(forky: "Forky", display: Display, source: str, machine: str, path: str) -> "Copied":
    import tempfile

    from forkypig.cli import terminal
    from forkypig.sdk.transfer import Copied

    found = await forky.get(machine)
    if source != "-":
        return await found.upload(source, path, on_bytes=display.on_bytes)
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as kept:
        while data := await terminal.read_stdin():
            kept.write(data)
        size = kept.tell()
        kept.seek(0)
        await found.upload_from(kept, size, path, on_bytes=display.on_bytes)
    return Copied(1, size)


def _report(copied: "Copied", *, quiet: bool, as_json: bool) -> int | None:
    if as_json:
        printing.document({"files": copied.files, "bytes": copied.bytes, "left_out": list(copied.left_out)})
    elif not quiet and sys.stdout.isatty():
        files = "1 file" if copied.files == 1 else f"{copied.files} files"
        printing.say(f"copied {files}, {sizes.human(copied.bytes)}")
    for what in copied.left_out:
        printing.trouble(f"left out {what}")
    return 1 if copied.left_out else None
