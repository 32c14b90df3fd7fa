"""Reads everything and says what is damaged or missing, and which snapshots that concerns. Changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forkypig.chunks import manifest_file
from forkypig.chunks.format import Hashes, as_hashes, is_packed, keys_of
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.pack_index import find_in
from forkypig.chunks.section import Section, kinds
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, NotFound
from forkypig.model import SnapshotId

_CHUNKS_TOGETHER = 256
_REGIONS_TOGETHER = 64
_REGION_MIB = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be."""

    subject: str  # "pack 00…1" or the id of a snapshot
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check found."""

    packs: int
    chunks: int
    stored_bytes: int
    snapshots: int
    problems: tuple[Problem, ...]


def check(
    store: Store, progress: Callable[[int, int], None] = lambda done, total: None, *, deep: bool = True
) -> Checked:
    """Verifies every chunk of every pack, and that every snapshot has all that it needs; without `deep` the indexes of
    packs, blocks and device states alone. `progress` is told bytes of packs, done and in all. Takes no lock: what is
    packed or collected meanwhile is seen or not."""
    store.refresh()
    return _Check(store, progress, deep).run()


class _Check:
    """One check."""

    def __init__(self, store: Store, progress: Callable[[int, int], None], deep: bool) -> None:
        self._store = store
        self._deep = deep
        self._progress = progress
        self._problems: list[Problem] = []
        self._bad: Hashes = np.empty((0, 32), np.uint8)  # of chunks whose content is damaged; sorted

    def run(self) -> Checked:
        store = self._store
        numbers = store.numbers
        total = sum(self._size(number) for number in numbers)
        done = chunks = 0
        bad: list[bytes] = []
        for number in numbers:
            try:
                pack = store.pack(number)
            except NotFound:  # collected meanwhile
                continue
            except Damaged as error:
                self._problems.append(Problem(f"pack {number:016x}", str(error)))
                continue
            for first in range(0, len(pack) if self._deep else 0, _CHUNKS_TOGETHER):
                bad += self._damaged(number, range(first, min(first + _CHUNKS_TOGETHER, len(pack))))
                self._progress(done + int(pack.index.offsets[first]), total)
            done += pack.size_bytes
            chunks += len(pack)
            self._progress(done, total)
        self._bad = as_hashes(sorted(bad))
        snapshots = manifest_file.saved(store)
        for snapshot in snapshots:
            self._snapshot(snapshot)
        return Checked(
            packs=len(numbers),
            chunks=chunks,
            stored_bytes=done,
            snapshots=len(snapshots),
            problems=tuple(self._problems),
        )

    def _size(self, number: int) -> int:
        try:
            return self._store.pack(number).size_bytes
        except (NotFound, Damaged):
            return 0

    def _damaged(self, number: int, positions: range) -> list[bytes]:
        """The hashes of the damaged chunks among these."""
        pack = self._store.pack(number)
        try:
            pack.read_each(positions)
        except Damaged as error:
            if len(positions) > 1:
                half = len(positions) // 2
                return self._damaged(number, positions[:half]) + self._damaged(number, positions[half:])
            self._problems.append(Problem(f"pack {number:016x}", str(error)))
            return [pack.index.hashes[positions[0]].tobytes()]
        return []

    def _snapshot(self, snapshot: SnapshotId) -> None:
        try:
            manifest = manifest_file.load(self._store, snapshot)
        except NotFound:  # removed meanwhile
            return
        except Damaged as error:
            self._problems.append(Problem(snapshot, str(error)))
            return
        self._tell(snapshot, "pieces of its device state", *self._count(manifest.devices.hashes()))
        self._section(snapshot, "memory", manifest.memory, manifest)
        self._section(snapshot, "disk", manifest.disk, manifest)

    def _section(self, snapshot: SnapshotId, name: str, section: Section, manifest: Manifest) -> None:
        lost: list[int] = []
        missing = damaged = 0
        needs_base = False
        for first in range(0, section.regions, _REGIONS_TOGETHER):
            entries: list[Hashes] = []
            for region in range(first, min(first + _REGIONS_TOGETHER, section.regions)):
                try:
                    entries += section.page_hashes(self._store, [region])
                except (Damaged, NotFound):
                    lost.append(region)
            if entries:
                together = np.concatenate(entries)
                zero, base = kinds(together)
                needs_base |= bool(base.any())
                found = self._count(together[~zero & ~base])
                missing, damaged = missing + found[0], damaged + found[1]
        if needs_base and manifest.base is None:
            self._problems.append(Problem(snapshot, f"its {name} has pages of a base image, but names none"))
        if lost:
            where = f"the first at {lost[0] * _REGION_MIB} MiB"
            text = f"{len(lost) * _REGION_MIB} MiB of its {name} are lost with the blocks that describe them, {where}"
            self._problems.append(Problem(snapshot, text))
        self._tell(snapshot, f"pages of its {name}", missing, damaged)

    def _count(self, hashes: Hashes) -> tuple[int, int]:
        """How many of these are missing, and how many are damaged."""
        references = self._store.find(hashes)
        order = np.arange(len(self._bad), dtype=np.uint32)
        damaged = find_in(keys_of(self._bad), order, self._bad, hashes) >= 0
        return int(np.count_nonzero(~is_packed(references))), int(np.count_nonzero(damaged))

    def _tell(self, snapshot: SnapshotId, what: str, missing: int, damaged: int) -> None:
        for count, how in ((missing, "missing"), (damaged, "damaged")):
            if count:
                self._problems.append(Problem(snapshot, f"{count} {what} are {how}"))
