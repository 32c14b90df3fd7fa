"""What changed between two snapshots: pages of memory, and files."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forkypig import errors, model
from forkypig.sdk import patch as patches
from forkypig.sdk.borrowed import borrowed
from forkypig.sdk.connection import LONG_S, translated
from forkypig.sdk.file_list import FileEntry, hashes, listed
from forkypig.v1 import common_pb2
from forkypig.wire import convert

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.sdk.machine import Machine

OnProgress = Callable[[model.Progress], None]

# What every child is given anew (docs/identity.md): it says nothing about the snapshots.
_IDENTITY = ("/etc/hostname", "/etc/hosts", "/etc/machine-id", "/var/lib/dbus/machine-id")
_READ_TOGETHER = 8  # files: each waits for the guest's agent more than it keeps it busy


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that was added (`before` is None), removed (`after` is None) or changed."""

    path: str
    before: FileEntry | None
    after: FileEntry | None
    patch: str = ""  # as git writes it, where it was asked for

    @property
    def verb(self) -> str:
        """As git has it: A, D or M."""
        return "A" if self.before is None else "D" if self.after is None else "M"


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed."""

    before: model.SnapshotId
    after: model.SnapshotId
    memory: model.MemoryDiff
    files: tuple[FileChange, ...] = field(default_factory=tuple)


async def diff(forky: "Forky", before: str, after: str, patch: bool, on_progress: OnProgress | None) -> Diff:
    """See Forky.diff."""
    tell = on_progress or (lambda _: None)
    tell(model.Progress("starting a child of each"))
    async with borrowed(forky, before, after, name="diff") as forks:
        children = [fork.children[0] for fork in forks]
        tell(model.Progress("listing files"))
        old, new = await asyncio.gather(*(listed(child) for child in children))
        tell(model.Progress("comparing files"))
        files = await _changes(children, old, new)
        if patch:
            files = await _with_patches(children, files, tell)
        was, now = (fork.snapshot.id for fork in forks)
        memory = await _memory(forky, was, now, tell)
    return Diff(was, now, memory, tuple(files))


async def _changes(
    children: "Sequence[Machine]", old: dict[str, FileEntry], new: dict[str, FileEntry]
) -> list[FileChange]:
    paths = sorted((old.keys() | new.keys()).difference(_IDENTITY))
    changes = []
    doubtful = []  # nothing but the times tells them apart, or not even these
    for path in paths:
        before, after = old.get(path), new.get(path)
        if before is None or after is None or not before.looks_like(after):
            changes.append(FileChange(path, before, after))
        elif before.kind == "file" and before.changed_ns != after.changed_ns:
            doubtful.append(path)
    found = await asyncio.gather(*(hashes(child, doubtful) for child in children))
    for path, was, now in zip(doubtful, *found, strict=True):
        if was != now:
            changes.append(FileChange(path, old[path], new[path]))
    return sorted(changes, key=lambda change: change.path)


async def _with_patches(children: "Sequence[Machine]", changes: list[FileChange], tell: OnProgress) -> list[FileChange]:
    """The changes with their patches."""
    turns = asyncio.Semaphore(_READ_TOGETHER)
    done = 0

    async def with_patch(change: FileChange) -> FileChange:
        nonlocal done
        sides = (change.before, change.after)
        async with turns:
            old, new = [await _content(child, change.path, entry) for child, entry in zip(children, sides, strict=True)]
        done += 1
        tell(model.Progress("reading files", done, len(changes)))
        return replace(change, patch=patches.patch(change.path, *sides, old, new))

    return list(await asyncio.gather(*(with_patch(change) for change in changes)))


async def _content(child: "Machine", path: str, entry: FileEntry | None) -> bytes | None:
    """What a patch is made of; None where there is nothing, or too much."""
    if entry is not None and entry.kind == "link":
        return entry.target.encode(errors="surrogateescape")
    if entry is None or entry.kind != "file" or entry.size_bytes > patches.LARGEST_BYTES:
        return None
    return await child.read_file(path)


async def _memory(
    forky: "Forky", before: model.SnapshotId, after: model.SnapshotId, tell: OnProgress
) -> model.MemoryDiff:
    request = common_pb2.DiffMemoryRequest(before=before, after=after)
    async for message in translated(forky.socket, forky.controller.DiffMemory(request, timeout=LONG_S)):
        update = convert.memory_diff_from_wire(message)
        if isinstance(update, model.MemoryDiff):
            return update
        tell(update)
    raise errors.InternalError("the comparison ended without a result: the daemons' logs say more")
