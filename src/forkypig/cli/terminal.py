"""Our own terminal and pipes while a command runs in a machine."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator

CHUNK_BYTES = 64 << 10
STDIN, STDOUT, STDERR = 0, 1, 2


def size() -> tuple[int, int]:
    """(rows, columns) of the terminal that we write to, or of an old one when there is none."""
    for fd in (STDOUT, STDIN, STDERR):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if rows and columns:
                return rows, columns
    return 24, 80


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Keys go through as they are pressed, Ctrl-C too; however the block ends, the terminal is as before."""
    if not os.isatty(STDIN):
        yield
        return
    before = termios.tcgetattr(STDIN)
    try:
        tty.setraw(STDIN, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


@contextlib.contextmanager
def on_resize(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` on the loop whenever the terminal's size changes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, tell)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def read_stdin() -> bytes:
    """The next bytes of our standard input; empty at its end.

    Waits for the descriptor instead of making it non-blocking, which it would stay for the shell that we share it
    with, and instead of a thread, which nothing could call back from its read at Ctrl-C."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(STDIN, ready.set)
    except PermissionError:  # a regular file can't be waited for, and never makes anybody wait
        return os.read(STDIN, CHUNK_BYTES)
    except OSError:  # closed
        return b""
    try:
        await ready.wait()
    finally:
        loop.remove_reader(STDIN)
    return os.read(STDIN, CHUNK_BYTES)


def write(fd: int, data: bytes) -> None:
    """All of `data`, at once and unbuffered. Raises BrokenPipeError when nobody reads any more."""
    sys.stdout.flush()
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
