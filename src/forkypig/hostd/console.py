"""A machine's console: what it has written to its serial port, as a file that QEMU appends to."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from forkypig.hostd.machine import LiveMachine

_CHUNK = 256 << 10
_POLL_S = 0.1  # a person reads along; inotify would not be worth its code


async def read_console(live: LiveMachine, *, follow: bool) -> AsyncIterator[bytes]:
    """The console from its beginning; with `follow` also what comes, until the machine is removed."""
    offset = 0
    while True:
        gone = live.removed.is_set()
        while data := await asyncio.to_thread(_read, live.record.console, offset):
            offset += len(data)
            yield data
        if gone or not follow:
            return
        await asyncio.sleep(_POLL_S)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK)
    except FileNotFoundError:
        return b""
