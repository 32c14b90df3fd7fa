"""The roll of frozen processes: what a holder must know again when it takes over the connection of one that died.

A file in the run directory, replaced at each change. Packed snapshots are not in it: the store has them.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from forkypig.errors import ForkyError
from forkypig.pager.catalogue import Catalogue
from forkypig.pager.snapshot import Snapshot, State

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Frozen:
    """A snapshot whose memory is in a process."""

    snapshot: str
    size_bytes: int
    parent: str
    pid: int
    started: str  # when, in clock ticks since boot: a pid that is used again is never taken for it
    address: int


def write(path: Path, snapshots: Iterable[Snapshot]) -> None:
    """Writes the roll. Not synced: it is for the death of a process, not of the host. Where there is no room the old
    one stays, and a holder that takes over before the next change does not know the youngest: no reason to fail a
    fork, or a removal, which may be what makes room."""
    entries = [
        Frozen(one.id, one.size_bytes, one.parent_id, one.frozen.pid, state[1], one.address)
        for one in snapshots
        if one.frozen is not None and (state := _stat(one.frozen.pid)) is not None
    ]
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps([asdict(entry) for entry in entries]))
        part.replace(path)
    except OSError as error:
        log.error("the roll of frozen processes is not up to date", error=str(error))
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


async def call(path: Path, catalogue: Catalogue) -> None:
    """Reserves what the roll says, parents first as they stand there, and binds what is frozen."""
    try:
        entries = [Frozen(**entry) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        log.error("no roll of frozen processes", error=str(error))
        return
    for entry in entries:
        state = _stat(entry.pid)
        try:
            if state is not None and state[1] == entry.started:
                await catalogue.reserve(entry.snapshot, entry.size_bytes, entry.parent, entry.pid, entry.address)
                if state[0] == "T":  # SIGSTOP is what freezes, and only the one that it freezes gets it
                    catalogue.bind(entry.snapshot)
        except ForkyError as error:
            log.error("frozen snapshot lost", snapshot=entry.snapshot, error=str(error))
    found = sum(snapshot.state is State.FROZEN for snapshot in catalogue.snapshots.values())
    log.info("took over", frozen=found, known=len(catalogue.snapshots))


def _stat(pid: int) -> tuple[str, str] | None:
    """State and start of a process; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[0], fields[19]
