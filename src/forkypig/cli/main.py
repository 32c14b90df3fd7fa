"""The program `forky`: puts the commands together. Nothing here or in the commands' modules may import gRPC or rich
at the top: `forky --help` is to answer within 200 ms."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from forkypig.cli import (
    audit,
    auth,
    completion,
    config,
    copying,
    daemons,
    diff,
    execution,
    forks,
    history,
    images,
    ksm,
    machines,
    mcp,
    observing,
    pools,
    runtime,
    store,
    surroundings,
    tenants,
)
from forkypig.cli.arguments import split_command
from forkypig.cli.topics import ByTopic

app = typer.Typer(
    cls=ByTopic,
    help="Forky Pig forks running virtual machines the way a kernel forks processes.",
    epilog="FORKY_HOME chooses the directory that everything lives under. Commands start the daemons if none run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich takes longer to import than all of ours
    pretty_exceptions_enable=False,
)
ROOMS = (
    *(machines, forks, history, diff, execution, copying, surroundings, pools, store, observing, daemons, tenants),
    *(audit, mcp, completion),
)
for room in ROOMS:
    app.registered_commands += room.app.registered_commands
app.add_typer(config.app, name="config")
app.add_typer(images.app, name="image")
app.add_typer(ksm.app, name="ksm")
app.add_typer(pools.pool, name="pool")
app.add_typer(store.keys, name="key")
app.add_typer(auth.auth, name="auth")
app.add_typer(tenants.tenants, name="tenant")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"forky {version('forkypig')}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    tenant: Annotated[
        str, typer.Option("--tenant", metavar="TENANT", help="Act in this tenant (the operator); FORKY_TENANT too.")
    ] = "",
) -> None:
    """Forky Pig forks running virtual machines the way a kernel forks processes."""
    if tenant:
        os.environ["FORKY_TENANT"] = tenant


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line and ends the process with its exit code."""
    words, command = split_command(sys.argv[1:] if argv is None else argv)
    runtime.run(lambda: app(words, prog_name="forky", obj=command, standalone_mode=False))


if __name__ == "__main__":
    main()
