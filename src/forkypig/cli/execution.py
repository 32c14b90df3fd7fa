"""forky exec and shell, and the command that `forky run` may end in."""

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig import errors
from forkypig.cli import printing, terminal
from forkypig.cli.arguments import MachineName, assignments
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.sdk.machine import Machine
    from forkypig.sdk.process import Process

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


async def collected(machine: "Machine", command: list[str], **options: Any) -> tuple[dict[str, Any], int]:
    """Runs a command to its end; a document of it, and the exit code."""
    result = await machine.exec(command, **options)
    document = {
        "exit_code": result.exit_code,
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "timed_out": result.timed_out,
        "failure": result.failure or None,
    }
    return document, result.exit_code


async def attached(
    machine: "Machine", command: list[str], *, stdin: bool = False, on_terminal: bool = False, **options: Any
) -> int:
    """Runs a command on our own input and output; its exit code."""
    if on_terminal:
        options["environment"] = {"TERM": os.environ.get("TERM", "xterm"), **options.get("environment", {})}
    process = machine.process(command, terminal=terminal.size() if on_terminal else None, stdin=stdin, **options)
    async with process, contextlib.AsyncExitStack() as stack:
        if on_terminal:
            stack.enter_context(_resizing(process))
            if stdin:
                stack.enter_context(terminal.raw())
        if stdin:
            stack.push_async_callback(_end, asyncio.create_task(_forward(process)))
        async for output in process:
            terminal.write(terminal.STDOUT if output.stream == "stdout" else terminal.STDERR, output.data)
    if process.failure:
        printing.trouble(f"«{command[0]}» could not start in {machine.name}: {process.failure}")
    elif process.timed_out:
        printing.trouble(f"«{command[0]}» in {machine.name} ran for its whole --timeout and was ended")
    return process.exit_code


async def _forward(process: "Process") -> None:
    """Our standard input to the command's, until either ends."""
    with contextlib.suppress(errors.NotPossibleNow):  # it ended; reading its output tells how
        while data := await terminal.read_stdin():
            await process.write(data)
        await process.close_stdin()


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def _resizing(process: "Process") -> Any:
    """Tells the command's terminal of every new size of ours."""
    tasks: set[asyncio.Task[None]] = set()

    async def tell() -> None:
        with contextlib.suppress(errors.NotPossibleNow):
            await process.resize(*terminal.size())

    def changed() -> None:
        tasks.add(task := asyncio.create_task(tell()))
        task.add_done_callback(tasks.discard)

    with terminal.on_resize(changed):
        yield
    for task in tasks:
        task.cancel()
