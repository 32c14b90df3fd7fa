"""`python -m forkypig.archive`: one transfer or upkeep of the store, then it ends.

Reads one line of JSON that says what to do, and for an import the file after it; answers in frames: progress, the head
and the data of an export, at last a result or an error. It runs at low priority and ends with hostd; a kill at any
moment leaves snapshots whole, and rubbish for `gc`.
"""

import base64
import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forkypig.archive import exporting, frames, importing, pulling, pushing
from forkypig.archive.head import About, Head
from forkypig.archive.importing import Arrived
from forkypig.archive.pins import pinned, pinning
from forkypig.archive.remote import Remote
from forkypig.archive.reporting import Meter
from forkypig.chunks import durable
from forkypig.chunks.check import check
from forkypig.chunks.collect import Moved, collect
from forkypig.chunks.store import open_store
from forkypig.errors import ForkyError, InternalError, NotPossibleNow, ResourceExhausted
from forkypig.images.store import ImageStore
from forkypig.model import SnapshotId

_PR_SET_PDEATHSIG = 1
_MOST_REQUEST = 1 << 24
_NICE = 10

Result = dict[str, Any]


def step_back() -> None:
    """Machines come first; and who asked may die."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Work:
    """What one request needs."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.store = open_store(Path(request["store"]))
        self.images = ImageStore(Path(request["images"]))
        self.cache = Path(request["cache"])
        self.out, self.into = sys.stdout.buffer, sys.stdin.buffer
        self.meter = Meter(lambda step, done, total: self.say(progress=[step, done, total]))

    def say(self, **event: Any) -> None:
        """Tells hostd."""
        frames.write(self.out, frames.EVENT, json.dumps(event).encode())

    def remote(self, *, make: bool = False) -> Remote:
        """The place that the request names."""
        return Remote.open(self.request["url"], self.request["environment"], make=make)

    def about(self) -> About:
        """What hostd knows of the snapshot."""
        told = dict(self.request["about"])
        return About(**{**told, "forget_files": tuple(told["forget_files"])})

    def export(self) -> Result:
        snapshot = SnapshotId(self.request["snapshot"])
        with pinning(self.store) as pins:
            made = exporting.export(
                self.store,
                self.images,
                pins,
                snapshot,
                self.about(),
                with_image=self.request["with_image"],
                meter=self.meter,
            )
            self.say(head=base64.b64encode(made.head).decode())
            for piece in made.rest:
                frames.write(self.out, frames.DATA, piece)
        return {}

    def import_(self) -> Result:
        trusted = base64.b64decode(self.request["trusted"])
        with pinning(self.store) as pins:
            return _arrived(
                importing.import_(
                    self.into,
                    self.store,
                    self.images,
                    pins,
                    known=self.request["known"],
                    trusted=trusted,
                    meter=self.meter,
                )
            )

    def push(self) -> Result:
        snapshot = SnapshotId(self.request["snapshot"])
        remote = self.remote(make=True)
        with pinning(self.store) as pins:
            done = pushing.push(self.store, self.images, pins, remote, snapshot, self.about(), self.cache, self.meter)
        return {"was_there": done.was_there, "chunks": done.new_chunks, "bytes": done.sent_bytes}

    def pull(self) -> Result:
        remote = self.remote()
        with pinning(self.store) as pins:
            return _arrived(
                pulling.pull(
                    self.store,
                    self.images,
                    pins,
                    remote,
                    self.request["name"],
                    known=self.request["known"],
                    cache=self.cache,
                    meter=self.meter,
                )
            )

    def list(self) -> Result:
        return {"snapshots": [_told(head) for head in pulling.heads(self.remote())]}

    def collect(self) -> Result:
        self.meter.begin("collecting")
        done = collect(
            self.store,
            pinned(self.store),
            before_removal=self._tell,
            dry_run=self.request["dry_run"],
            without=[SnapshotId(each) for each in self.request["orphans"]],
        )
        return {
            "snapshots": done.manifests,
            "chunks_kept": done.chunks_kept,
            "packs_removed": done.packs_removed,
            "packs_rewritten": done.packs_rewritten,
            "freed_bytes": done.freed_bytes,
            "more_bytes": done.more_bytes,
            "problems": list(done.problems),
        }

    def _tell(self, moved: Moved) -> None:
        """Tells hostd where chunks are now, and waits until whoever holds references has heard of it."""
        directory = self.store.directory / "transfers"
        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / f"moved{durable.PART}"
        try:
            with durable.room(path), path.open("wb") as file:
                tables: dict[str, Any] = {f"{number:016x}": table for number, table in moved.tables.items()}
                np.savez(file, **tables)
            self.say(moved=str(path))
            if self.into.readline(16) != b"told\n":
                raise NotPossibleNow("hostd has gone away: the collection was ended, and nothing is lost")
        finally:
            path.unlink(missing_ok=True)

    def check(self) -> Result:
        self.meter.begin("checking")
        done = check(self.store, self.meter.at, deep=self.request["deep"])
        return {
            "packs": done.packs,
            "chunks": done.chunks,
            "stored_bytes": done.stored_bytes,
            "snapshots": done.snapshots,
            "problems": [[problem.subject, problem.text] for problem in done.problems],
        }


_DO: dict[str, Callable[[Work], Result]] = {
    "export": Work.export,
    "import": Work.import_,
    "push": Work.push,
    "pull": Work.pull,
    "list": Work.list,
    "collect": Work.collect,
    "check": Work.check,
}


def _told(head: Head) -> Result:
    return {"snapshot": head.snapshot, **asdict(head.about)}


def _arrived(arrived: Arrived) -> Result:
    """A snapshot that came, for a record."""
    result: Result = {
        "snapshot": arrived.head.snapshot,
        "was_here": arrived.manifest is None,
        "about": asdict(arrived.head.about),
        "chunks": arrived.new_chunks,
        "bytes": arrived.new_bytes,
    }
    if (manifest := arrived.manifest) is not None:
        result |= {
            "parent": manifest.parent,
            "created_us": manifest.created_us,
            "shape": asdict(manifest.shape),
            "needs": asdict(manifest.needs),
            "image": manifest.base.id if manifest.base else None,
        }
    return result


def _failed(error: BaseException) -> ForkyError:
    if isinstance(error, ForkyError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted("the disk is full: free space below FORKY_HOME and try again")
    return InternalError(f"an unexpected error ({type(error).__name__}): {error}")


def main() -> int:
    step_back()
    request = json.loads(sys.stdin.buffer.readline(_MOST_REQUEST))
    try:
        work = Work(request)
        with suppress(BrokenPipeError):
            work.say(result=_DO[request["do"]](work))
    except Exception as error:  # the edge of the process: hostd tells it
        if not isinstance(error, ForkyError | OSError):
            import traceback

            traceback.print_exc()
        failed = _failed(error)
        told = json.dumps({"error": [type(failed).__name__, str(failed)]}).encode()
        with suppress(BrokenPipeError):
            frames.write(sys.stdout.buffer, frames.EVENT, told)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
