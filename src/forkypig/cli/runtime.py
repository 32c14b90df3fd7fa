"""Runs one command: an event loop, a connection, signals, and what each kind of end means as an exit code.

asyncio is imported when a command runs: it costs a fifth of what `forky --help` may take."""

import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from forkypig import errors, tracing
from forkypig.cli.printing import trouble
from forkypig.cli.progress import Display

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT

# The exit code, None for success.
Work = Coroutine[Any, Any, int | None]


def perform(work: Callable[[], Work]) -> None:
    """Runs `work` on a loop until it ends or a signal ends it; raises typer.Exit with its code if that is not 0."""
    import asyncio

    code = asyncio.run(_guarded(work))
    if code:
        raise typer.Exit(code)


def connected(work: "Callable[[Forky], Work]") -> None:
    """Runs `work` with a connection, the daemons started if none run."""

    async def inner() -> int | None:
        from forkypig.sdk.client import Forky

        display = Display()
        with tracing.root(" ".join(("forky", *_command()))):
            with display:
                forky = await Forky(on_progress=display.on_progress).connect()
            try:
                return await work(forky)
            finally:
                await forky.close()

    tracing.start("forky")
    try:
        perform(inner)
    finally:
        tracing.close()


def _command() -> list[str]:
    """The command's own name, without what it was given."""
    return [word for word in sys.argv[1:2] if word.isalpha()]


async def _guarded(work: Callable[[], Work]) -> int | None:
    """Makes SIGTERM and SIGHUP unwind as Ctrl-C does, so that terminals are restored and guest commands ended."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    ended_by: list[int] = []

    def end(number: int) -> None:
        ended_by.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        return await work()
    except asyncio.CancelledError:
        if ended_by:
            return 128 + ended_by[0]
        raise


def exit_code(error: errors.ForkyError) -> int:
    """What can't be right however often it is tried is the usage's fault."""
    return USAGE if isinstance(error, errors.InvalidRequest) else FAILED


def run(app: Callable[[], int | None]) -> NoReturn:
    """Runs the parsed command line and ends the process."""
    try:
        code = app() or OK
        sys.stdout.flush()
    except errors.ForkyError as error:
        trouble(str(error))
        code = exit_code(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = FAILED
        _drop_stdout()
    except typer.TyperException as error:
        trouble(_usage(error))
        code = error.exit_code
    except OSError as error:
        trouble(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        code = FAILED
    sys.exit(code)


def _drop_stdout() -> None:
    """Whoever read our output has gone: Python's own flush at exit must not complain about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _usage(error: typer.TyperException) -> str:
    """A parser's error as one sentence that says where to read on."""
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "forky"
    return f"{message[:1].lower()}{message[1:]}: see `{path} --help`"
