"""forky exec and shell."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig.cli import printing
from forkypig.cli.arguments import MachineName, assignments
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

app = typer.Typer()

# A login shell, the best that the machine has.
_SHELL = ("/bin/sh", "-c", "[ -x /bin/bash ] && exec /bin/bash -l; exec /bin/sh -l")

Environment = Annotated[
    list[str] | None, typer.Option("-e", "--env", metavar="K=V", help="Add to the command's environment.")
]
Directory = Annotated[str, typer.Option("-w", "--workdir", metavar="DIR", help="Where it runs; else the user's home.")]
User = Annotated[str, typer.Option("--user", "-u", metavar="U", help="Who runs it; else root.")]


@app.command("exec")
def execute(
    context: typer.Context,
    machine: MachineName,
    argv: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGV...", help="The command and its arguments.", show_default=False),
    ] = None,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="Forward our standard input.")] = False,
    on_terminal: Annotated[bool, typer.Option("-t", "--tty", help="Run it on a terminal.")] = False,
    environment: Environment = None,
    directory: Directory = "",
    user: User = "",
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", min=0, metavar="S", help="End it after so many seconds.", show_default="none"),
    ] = 0.0,
    as_json: printing.Json = False,
) -> None:
    """Run a command in a machine.

    Output streams as it comes; the exit code is the command's own, 124 if it timed out, 126 or 127 if it could not
    start. Ctrl-C ends it.
    """
    command = [*(argv or []), *(context.obj or [])]
    if not command:
        raise typer.BadParameter("no command is given: write it after «--»", param_hint="ARGV")
    if as_json and (interactive or on_terminal):
        raise typer.BadParameter("--json gathers the output: leave out -i and -t", param_hint="--json")
    options: dict[str, Any] = {
        "environment": assignments(environment or []),
        "directory": directory,
        "user": user,
        "timeout_s": timeout_s,
    }

    async def work(forky: "Forky") -> int:
        from forkypig.cli.attachment import attached, collected

        found = await forky.get(machine)
        if as_json:
            result, code = await collected(found, command, **options)
            printing.document(result)
            return code
        return await attached(found, command, stdin=interactive, on_terminal=on_terminal, **options)

    connected(work)


@app.command()
def shell(
    machine: MachineName,
    environment: Environment = None,
    directory: Directory = "",
    user: User = "",
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """Open a terminal in a machine. It ends with its shell: exit, or Ctrl-D."""
    if as_json:
        raise typer.BadParameter("a terminal is no JSON document: use `forky exec --json`", param_hint="--json")
    found_environment = assignments(environment or [])

    async def work(forky: "Forky") -> int:
        from forkypig.cli.attachment import attached

        return await attached(
            await forky.get(machine),
            list(_SHELL),
            stdin=True,
            on_terminal=True,
            environment=found_environment,
            directory=directory,
            user=user,
        )

    connected(work)
