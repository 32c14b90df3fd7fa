"""What hostd must know again after a crash: a JSON file per machine and per snapshot, replaced atomically.

`save` does not sync: most changes have to survive the death of hostd, and after a power cut no QEMU is left to be
adopted. What has to be there after a power cut too is synced before it is reported: packed snapshots by `prepare` and
`put`, machines that hibernate or are to come back by `sync`.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar
from uuid import UUID

import structlog
from pydantic import TypeAdapter, ValidationError

from forkypig.chunks.durable import sync_directory, sync_file
from forkypig.errors import ResourceExhausted, full_disk_told
from forkypig.model import Machine, MachineId, Snapshot, SnapshotId
from forkypig.qemu.command import Hardware

log = structlog.get_logger()

_NEW = ".new"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """A machine, and what hostd needs to go on with it."""

    machine: Machine
    hardware: Hardware
    process_id: str  # of the QEMU that runs it, or ran it last
    disk: Path  # its writable overlay
    console: Path
    memory: SnapshotId | None  # whose memory its QEMU maps; None: it booted, now or after a stop
    generation_id: UUID  # what VMGENID says; a machine keeps it over its own forks
    slot: str = ""  # its network namespace; "": none
    machine_id: str = ""  # what its guest has in /etc/machine-id; "": not known
    held: bool = False  # it does not run now and is to: the next hostd, should this one die, lets it go on


class SnapshotPhase(Enum):
    """Where a snapshot's memory is."""

    SPLITTING = "splitting"  # the split is under way: after a crash it is finished or undone
    FROZEN = "frozen"  # in a QEMU process that was stopped for ever
    PACKED = "packed"  # in the chunk store, with its disk and device state: it needs no other file but its image
    LOST = "lost"  # nowhere: its process ended before it was packed; its disk is there for what stands on it


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord:
    """A snapshot, and where its parts lie."""

    snapshot: Snapshot
    phase: SnapshotPhase
    hardware: Hardware
    process_id: str  # of the frozen QEMU
    address: int  # of guest memory in it
    disk: Path  # its overlay; of a packed one nobody's, and so removed
    devices: Path  # device state, until it is packed
    memory: SnapshotId | None  # whose memory the frozen QEMU maps
    successor: str = ""  # process id of the shell that was to go on, while splitting
    successor_disk: Path | None = None
    was_running: bool = True
    cpu: str = ""  # the host's, where the guest sees it; "": the guest's is QEMU's own
    cpu_features: tuple[str, ...] = ()

    @property
    def is_durable(self) -> bool:
        """Whether it outlives its process, and a power cut."""
        return self.phase is SnapshotPhase.PACKED


@contextlib.contextmanager
def _or_nothing(new: Path) -> Iterator[None]:
    """What the block writes to `new` is not left half done."""
    try:
        with full_disk_told():
            yield
    except (OSError, ResourceExhausted):
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


_Record = TypeVar("_Record")
_Id = TypeVar("_Id", bound=str)


class Ledger(Generic[_Id, _Record]):
    """One JSON file per record in a directory."""

    def __init__(self, directory: Path, record_type: type[_Record]) -> None:
        self._directory = directory
        self._adapter: TypeAdapter[_Record] = TypeAdapter(record_type)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, record_id: _Id) -> Path:
        return self._directory / f"{record_id}.json"

    def save(self, record_id: _Id, record: _Record) -> None:
        """Writes a record whole or not at all. Raises ResourceExhausted when the disk is full."""
        path = self._path(record_id)
        new = path.with_suffix(_NEW)
        with _or_nothing(new):
            new.write_bytes(self._adapter.dump_json(record))
            new.replace(path)

    def prepare(self, record_id: _Id, record: _Record) -> Path:
        """Writes a record beside its place, durably; `put` makes it the record. Blocks as long as the disk does.
        Raises ResourceExhausted when the disk is full."""
        new = self._directory / f"{record_id}.{secrets.token_hex(4)}{_NEW}"
        with _or_nothing(new), new.open("xb") as file:
            file.write(self._adapter.dump_json(record))
            file.flush()
            os.fsync(file.fileno())
        return new

    def put(self, record_id: _Id, prepared: Path) -> None:
        """Makes what `prepare` wrote the record: from here on it survives our death, after `sync` a power cut too."""
        prepared.replace(self._path(record_id))

    def sync(self, *record_ids: _Id) -> None:
        """Makes what was put durable, and these records as `save` has left them. Blocks as long as the disk does."""
        for record_id in record_ids:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                sync_file(self._path(record_id))
        sync_directory(self._directory)

    def delete(self, record_id: _Id) -> None:
        """Removes a record; one that is not there is fine."""
        self._path(record_id).unlink(missing_ok=True)

    def load(self) -> dict[str, _Record]:
        """All records by id. An unreadable one is set aside and logged: it must not keep the others from coming up."""
        for leftover in self._directory.glob(f"*{_NEW}"):
            leftover.unlink(missing_ok=True)
        records = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                records[path.stem] = self._adapter.validate_json(path.read_bytes())
            except (ValidationError, OSError) as error:
                log.error("unreadable record", path=str(path), error=str(error))
                path.replace(path.with_suffix(".damaged"))
        return records


def machine_ledger(home: Path) -> "Ledger[MachineId, MachineRecord]":
    return Ledger(home / "machines", MachineRecord)


def snapshot_ledger(home: Path) -> "Ledger[SnapshotId, SnapshotRecord]":
    return Ledger(home / "snapshots", SnapshotRecord)
