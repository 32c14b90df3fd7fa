"""A command in a machine on our own input and output, or with its output gathered into a document."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from forkypig import errors
from forkypig.cli import printing, terminal

if TYPE_CHECKING:
    from forkypig.sdk.machine import Machine
    from forkypig.sdk.process import Process


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
def _resizing(process: "Process") -> Iterator[None]:
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
