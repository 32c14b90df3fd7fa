"""The audit log: a line of JSON for each call that changes something, is refused, or fails.

Lines are only ever appended (O_APPEND, 0600), by one process. A full file is renamed and compressed (gzip, so that
zgrep reads it), and the oldest is removed. A line is written when its call has ended; of what was under way when the
controller was killed the next one writes it (begun.py). A power cut loses the last seconds, since nothing is synced.

When it can't be written (a full disk), lines wait in memory for room, the daemon's own log says so, and calls that make
or change something are refused until there is room. What gives room back (removing, stopping) goes on.
"""

import asyncio
import contextlib
import gzip
import json
import os
import shutil
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict
from pathlib import Path

import structlog

from forkypig.controller.begun import Begun
from forkypig.daemon.server import now_us
from forkypig.errors import ResourceExhausted
from forkypig.model.access import AuditEntry, Principal

log = structlog.get_logger()

_CURRENT, _BEGUN = "audit.jsonl", "begun.json"
INTERRUPTED = "INTERRUPTED"  # the result of a call that the controller did not live to see the end of
_MOST_WAITING = 10_000  # lines: some megabytes
_GIVES_BACK = ("Remove", "Stop", "Revoke", "Collect", "Release", "Hibernate")  # what methods begin with


def entry_of(
    who: Principal | None, method: str, result: str, *, began_s: float, peer: str, about: str = ""
) -> AuditEntry:
    """What is written of a call. `who` None: somebody unknown; `method`, `peer`: as gRPC names them; `result`: the name
    of a gRPC status; `began_s`: by time.monotonic."""
    return AuditEntry(
        time_us=now_us(),
        who=who.name if who else "",
        tenant=who.tenant if who else "",
        role=("operator" if who.operator else who.role.value) if who else "",
        method=method.removeprefix("/").removeprefix("forkypig.v1."),
        about=about,
        result=result,
        duration_ms=round((time.monotonic() - began_s) * 1000, 1),
        peer=peer,
    )


class AuditLog:
    """The one in `directory`."""

    def __init__(self, directory: Path, file_bytes: int, files: int) -> None:
        """`files` full ones are kept. Raises OSError."""
        self._directory, self._file_bytes, self._files = directory, file_bytes, files
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / _CURRENT
        self._fd = self._open()
        self._waiting: deque[bytes] = deque()
        self._followers: set[asyncio.Queue[AuditEntry]] = set()
        self._lost = 0  # lines that did not even find room in memory
        self._compressing: asyncio.Future[None] | None = None
        self._begun = Begun.at(directory / _BEGUN)
        for said in self._begun.left:
            with contextlib.suppress(TypeError):  # of another version
                self.write(AuditEntry(**{**said, "result": INTERRUPTED}))
        self._begun.forget_left()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @property
    def stuck(self) -> bool:
        """Whether lines wait that could not be written."""
        return bool(self._waiting)

    def begin(self, method: str, entry: AuditEntry) -> int:
        """Before a call that changes something; the number is for `write` at its end. 0: it was not noted.

        Raises ResourceExhausted while lines can't be written, unless the call gives room back."""
        if self.stuck:
            self._flush()
        if not self.stuck:
            try:
                return self._begun.begin(entry)
            except OSError as error:
                log.error("audit log can't be written", path=str(self._path), error=str(error))
        if method.rpartition("/")[2].startswith(_GIVES_BACK):
            return 0
        raise ResourceExhausted(
            f"the audit log {self._path} can't be written, and nothing is done that it would not tell of: "
            "free space on that disk (removing and stopping machines go on), then try again"
        )

    def write(self, entry: AuditEntry, begun: int = 0) -> None:
        """Never raises: the call has been made, and its caller is to hear of it."""
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        else:
            self._lost += 1
            log.error("audit line lost", lost=self._lost, who=entry.who, method=entry.method, about=entry.about)
        self._flush()
        with contextlib.suppress(OSError):  # no room: after a crash it is told once more
            self._begun.end(begun)
        for follower in self._followers:
            if not follower.full():
                follower.put_nowait(entry)

    def _flush(self) -> None:
        was_stuck = len(self._waiting) > 1
        try:
            while self._waiting:
                line = self._waiting[0]
                written = os.write(self._fd, line)
                if written < len(line):  # the disk is full now; the rest of the line goes where this one ended
                    self._waiting[0] = line[written:]
                    continue
                self._waiting.popleft()
            if os.fstat(self._fd).st_size >= self._file_bytes:
                self._rotate()
        except OSError as error:
            if not was_stuck:
                log.error("audit log can't be written", path=str(self._path), error=str(error))

    def _rotate(self) -> None:
        self._path.rename(self._directory / f"audit-{time.time_ns() // 1000:020d}.jsonl")
        os.close(self._fd)
        self._fd = self._open()
        if self._compressing is None or self._compressing.done():
            self._compressing = asyncio.ensure_future(asyncio.to_thread(self._tidy))

    def _tidy(self) -> None:
        """Compresses what is full, and removes the oldest. Blocks: for a thread."""
        try:
            for path in sorted(self._directory.glob("audit-*.jsonl")):
                packed, half = path.with_suffix(".jsonl.gz"), path.with_suffix(".jsonl.gz.new")
                with path.open("rb") as plain, gzip.open(half, "wb") as file:
                    shutil.copyfileobj(plain, file)
                half.chmod(0o600)
                half.rename(packed)
                path.unlink()
            for path in sorted(self._directory.glob("audit-*.jsonl*"))[: -self._files or None]:
                path.unlink()
        except OSError as error:
            log.warning("audit log not tidied", error=str(error))

    async def read(self, since_us: int, *, follow: bool) -> AsyncGenerator[AuditEntry, None]:
        """The entries since then, oldest first; with `follow` also those that come, without end. Raises
        ResourceExhausted when they come faster than they are taken."""
        coming: asyncio.Queue[AuditEntry] = asyncio.Queue(_MOST_WAITING)
        with contextlib.ExitStack() as stack:
            # Files and queue are of one instant: no entry is in both, or in neither.
            self._flush()
            past = self._opened(stack)
            if follow:
                self._followers.add(coming)
                stack.callback(self._followers.discard, coming)
            for file in past:
                for entry in await asyncio.to_thread(_entries, file, since_us):
                    yield entry
            while follow:
                if coming.full():
                    raise ResourceExhausted("more is done than you read: follow again with `--since`")
                if (entry := await coming.get()).time_us >= since_us:
                    yield entry

    def _opened(self, stack: contextlib.ExitStack) -> list[Iterable[bytes]]:
        """The lines of all files as they are now, whatever is renamed, compressed or removed from here on."""
        found: list[Iterable[bytes]] = []
        seen = set()
        for path in [*sorted(self._directory.glob("audit-*.jsonl*")), self._path]:
            if path.suffix == ".new" or path.name.removesuffix(".gz") in seen:
                continue  # half compressed, or compressed and not removed yet
            seen.add(path.name.removesuffix(".gz"))
            if path.suffix != ".gz":
                with contextlib.suppress(FileNotFoundError):
                    found.append(path.read_bytes().splitlines())
                    continue
                path = path.with_suffix(".jsonl.gz")  # just now
            with contextlib.suppress(FileNotFoundError):  # the oldest, just now
                found.append(stack.enter_context(gzip.GzipFile(path, "rb")))
        return found

    async def close(self) -> None:
        self._flush()
        if self._compressing is not None:
            await asyncio.wait([self._compressing])
        os.close(self._fd)
        self._begun.close()


def _entries(lines: Iterable[bytes], since_us: int) -> list[AuditEntry]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # a line that a power cut has torn
            entry = AuditEntry(**json.loads(line))
            if entry.time_us >= since_us:
                found.append(entry)
    return found
