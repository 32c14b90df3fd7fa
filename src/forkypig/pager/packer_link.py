"""The holder's side of the packer process: starts it ahead of its first job and gives it one job at a time. When it
dies the job that it was at fails, and the next one starts another."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from forkypig.errors import DeadlineExceeded, NotPossibleNow
from forkypig.pager import kept_key
from forkypig.pager.pack_job import Job
from forkypig.pager.packer import FDS_TOGETHER, HEADER, LAST

log = structlog.get_logger()

# The packer says something every 16 MiB. At the lowest priority on a busy host, or with a disk that is slow to sync,
# that may take long; this is for one that hangs.
_SILENCE_S = 300.0
_STARTS = 2


_ENVIRONMENT = {
    # numpy's linear algebra would start threads, which we have no use for.
    "OPENBLAS_NUM_THREADS": "1",
    # Or the C library maps each buffer of some MiB anew, and a fifth of the CPU is the kernel's, clearing their pages.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


class PackerLink:
    """A packer process, or none. One job at a time; the caller sees to that."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._changing = asyncio.Lock()
        self._closed = False
        self._ahead: asyncio.Task[None] | None = None

    def start_soon(self) -> None:
        """A job may come: starts the process in the background, if there is none."""
        if self._ahead is None and not self._closed and not self._runs():
            self._ahead = asyncio.create_task(self._start_ahead(), name="packer")

    async def do(self, job: Job, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Has a job done; returns the last that the packer says about it (packer.py), and tells the rest. Raises
        NotPossibleNow when it dies, DeadlineExceeded when it stands still, OSError when it can't be started."""
        try:
            for _ in range(_STARTS):  # one that was killed while it waited is replaced
                await self._start()
                if (last := await self._try(job, tell)) is not None:
                    return last
        except BaseException:
            # Also one that a cancellation left: it must not go on to write the manifest.
            await self._end()
            raise
        raise NotPossibleNow(f"{job.snapshot} was not packed: the process that does it can't start; try again")

    async def close(self) -> None:
        """Ends the process."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait({self._ahead})
        await self._end()

    def _runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _start_ahead(self) -> None:
        try:
            await self._start()
        except (OSError, NotPossibleNow) as error:  # the first job meets it again, and tells
            log.warning("packer can't be started", error=str(error))
        finally:
            self._ahead = None

    async def _start(self) -> None:
        """Raises OSError, and NotPossibleNow at the pager's end."""
        async with self._changing:
            if self._closed:
                raise NotPossibleNow("nothing is packed any more: the pager is ending")
            if self._runs():
                return
            await self._ended()
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-P", "-m", "forkypig.pager.packer", str(theirs.fileno()), str(self._store)),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=asyncio.subprocess.PIPE,
                        pass_fds=(theirs.fileno(), *kept_key.descriptors()),
                        env={**os.environ, **_ENVIRONMENT},
                    )
                except BaseException:
                    ours.close()
                    raise
            self._socket = ours
            log.info("packer started", pid=self._process.pid)

    async def _try(self, job: Job, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """As `do`; None when it died before it began."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._socket is not None
        sending = asyncio.create_task(asyncio.to_thread(_send, self._socket, job))
        try:
            begun = False
            while line := await asyncio.wait_for(self._process.stdout.readline(), _SILENCE_S):
                begun, said = True, json.loads(line)
                if not said.keys().isdisjoint(LAST):
                    return dict(said)
                tell(said)
            status = await self._process.wait()
            if begun:
                raise NotPossibleNow(
                    f"{job.snapshot} was not packed: the process that did it ended (status {status}); try again"
                )
        except TimeoutError as error:
            self._kill()
            raise DeadlineExceeded(
                f"packing {job.snapshot} stood still for {_SILENCE_S:.0f} s: is the disk hung?"
            ) from error
        except BaseException:
            self._kill()
            raise
        finally:
            await asyncio.wait({sending})
            if not isinstance(failure := sending.exception(), OSError | None):  # it has died: the line says so
                log.error("a job could not be sent", exc_info=failure)
        return None

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _end(self) -> None:
        async with self._changing:
            self._kill()
            await self._ended()

    async def _ended(self) -> None:
        """Waits for the last one's end."""
        process, self._process = self._process, None
        if process is not None:
            await process.wait()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _send(connection: socket.socket, job: Job) -> None:
    """On a thread: it may have to wait until the packer has started. Raises OSError when that has died."""
    encoded, fds = job.encode(), job.descriptors
    connection.sendall(HEADER.pack(len(encoded), len(fds)))
    for first in range(0, len(fds), FDS_TOGETHER):
        socket.send_fds(connection, [b"+"], fds[first : first + FDS_TOGETHER])
    connection.sendall(encoded)
