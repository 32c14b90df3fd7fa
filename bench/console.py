"""Sees from the host how a guest gets on: the ticks that it prints on its console, timed by the host's clock."""

import asyncio
import bisect
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from forkypig.errors import DeadlineExceeded

_TICK, _PASS = b"\x01", b"\x02"
# Half of a tick: a stall is seen at most this much too long.
_POLL_S = 0.0005
_SOME_TICKS = 50
_START_S = 60.0


class ConsoleWatch:
    """Follows the console file of one machine in a thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)
        self._ticks: list[float] = []
        self._passes = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ending.is_set():
            data = os.read(self._fd, 1 << 16)
            if data:
                if _TICK in data:
                    self._ticks.append(time.perf_counter())
                self._passes += data.count(_PASS)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Ends the thread."""
        self._ending.set()
        self._thread.join()
        os.close(self._fd)

    async def ticking(self) -> None:
        """Waits until the ticker ticks. Raises DeadlineExceeded: under TCG on a busy host Python starts in seconds."""
        wanted = len(self._ticks) + _SOME_TICKS
        deadline = time.monotonic() + _START_S
        while len(self._ticks) < wanted:
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the guest's ticker does not start: look at /root/ticker.err in the machine")
            await asyncio.sleep(0.02)

    @property
    def passes(self) -> int:
        """How often the rewriter has been through its memory."""
        return self._passes

    async def largest_gap_ms(self, begin: float, end: float) -> float:
        """The longest time without a tick that began between two readings of perf_counter; waits for its end.

        Raises DeadlineExceeded when no tick comes any more: then the ticker is dead, not the machine stalled."""
        ticks = self._ticks
        deadline = time.monotonic() + _START_S
        while not ticks or ticks[-1] <= end:
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the guest's ticker is silent: look at its console")
            await asyncio.sleep(0.005)
        first, last = bisect.bisect_left(ticks, begin), bisect.bisect_right(ticks, end)
        seen = ticks[max(0, first - 1) : last + 1]
        return max(after - before for before, after in itertools.pairwise(seen)) * 1000


@contextlib.contextmanager
def watching(qemu_pid: int) -> Iterator[ConsoleWatch]:
    """Follows the console of the machine in this QEMU process; its successors write to the same file."""
    watch = ConsoleWatch(console_of(qemu_pid))
    try:
        yield watch
    finally:
        watch.close()


def console_of(qemu_pid: int) -> Path:
    """The console's file, from QEMU's command line."""
    for argument in Path(f"/proc/{qemu_pid}/cmdline").read_bytes().split(b"\0"):
        if argument.startswith(b"file,id=console,path="):
            return Path(os.fsdecode(argument.split(b"path=")[1].split(b",")[0]))
    raise FileNotFoundError(f"QEMU process {qemu_pid} has no console file")
