"""Takes away what no manifest names: packs without use go, packs with much rubbish are written anew.

Crash-safe in its order: what matters is in a new pack, durable, before the old one goes; a number once used is never
given again, so that a reference is to what it was to, or to nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from forkypig.chunks import durable, faults, manifest_file
from forkypig.chunks.format import (
    Hashes,
    Mask,
    References,
    as_hashes,
    is_packed,
    pack_path,
    packs_of,
    positions_of,
)
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.section import Section, kinds, read_hashes
from forkypig.chunks.store import Store
from forkypig.chunks.writer import Writer
from forkypig.errors import Damaged, ResourceExhausted
from forkypig.model import SnapshotId

RUBBISH = 0.25  # of a pack, from which on it is written anew: at most a third more is on disk than needed
SMALL_BYTES = 8 << 20
MANY_SMALL = 16  # small packs make each look-up longer, so they are put together when there are as many
_BLOCKS_TOGETHER = 64
_CHUNKS_TOGETHER = 1024


@dataclass(frozen=True, slots=True)
class Moved:
    """Where chunks are now: for each old pack the new reference by position, 0 for what is gone."""

    tables: Mapping[int, References] = field(default_factory=dict)

    def renamed(self, references: References) -> References:
        """The references after the collection. Raises Damaged for one to a chunk that was taken: it should have been
        kept."""
        found = references.copy()
        packed = np.flatnonzero(is_packed(references))
        numbers = packs_of(references[packed])
        for number in np.unique(numbers).tolist():
            table = self.tables.get(number)
            if table is not None:
                which = packed[numbers == number]
                found[which] = table[positions_of(references[which])]
                if not found[which].all():
                    raise Damaged(f"a chunk of pack {number:016x} was collected although somebody holds it")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection did."""

    manifests: int
    chunks_kept: int
    chunks_removed: int
    freed_bytes: int
    packs_removed: int
    packs_rewritten: int
    moved: Moved
    more_bytes: int = 0  # that writing packs anew would free, where that was not done
    problems: tuple[str, ...] = ()  # packs that could not be written anew: they stay as they are


def collect(
    store: Store,
    also_keep: Iterable[References] = (),
    *,
    before_removal: Callable[[Moved], None] = lambda _: None,
    wait: bool = True,
    rewrite: bool = True,
    dry_run: bool = False,
    without: Collection[SnapshotId] = (),
) -> Collected:
    """Collects. The manifests are read here, with the lock held: what was packed a moment ago counts.

    `also_keep`: references that somebody holds though no manifest names them. `before_removal` is called each time
    that chunks have moved, when the new pack is durable and the old ones are still there: whoever holds references
    changes them then; where nobody can tell them, packs are not to be written anew (`rewrite`). `dry_run`: only says
    what would go. `without`: manifests that nobody knows of; they go first. Raises Damaged, and takes nothing else,
    when a manifest or a block can't be read; Busy without `wait`."""
    with store.locked(wait=wait):
        return _Collection(store, before_removal, rewrite=rewrite, dry_run=dry_run).run(also_keep, frozenset(without))


def mark(store: Store, manifests: Iterable[Manifest]) -> dict[int, Mask]:
    """For each pack which chunks the manifests need, but for packs that can't be opened. Raises Damaged when a block
    can't be read, or something is missing that such a pack may have; else missing pages are no error."""
    used = {number: np.zeros(len(store.pack(number)), np.bool_) for number in store.numbers if _opens(store, number)}
    broken = [f"{number:016x}" for number in store.numbers if number not in used]

    def need(hashes: Hashes) -> None:
        references = store.find(hashes)
        if broken and not is_packed(references).all():
            raise Damaged(
                f"pack {', '.join(broken)} can't be opened, and there are snapshots that need what it holds: nothing "
                "was collected; remove those that `forky fsck` names, and collect again"
            )
        mark_references(used, references)

    blocks: set[bytes] = set()
    for manifest in manifests:
        need(manifest.devices.hashes())
        for section in (manifest.memory, manifest.disk):
            blocks.update(_rows(section))
    ordered = sorted(blocks)
    for first in range(0, len(ordered), _BLOCKS_TOGETHER):
        hashes = as_hashes(ordered[first : first + _BLOCKS_TOGETHER])
        need(hashes)
        entries = as_hashes(read_hashes(store, hashes))
        zero, base = kinds(entries)
        need(entries[~zero & ~base])
    return used


def _opens(store: Store, number: int) -> bool:
    try:
        store.pack(number)
    except Damaged:
        return False
    return True


def mark_references(used: dict[int, Mask], references: References) -> None:
    """These chunks are needed."""
    references = references[is_packed(references)]
    numbers = packs_of(references)
    for number in np.unique(numbers).tolist():
        if number in used:
            used[number][positions_of(references[numbers == number])] = True


def _rows(section: Section) -> list[bytes]:
    hashes: Hashes = section.block_hashes()
    return [row.tobytes() for row in hashes]


class _Collection:
    """One collection, under the lock."""

    def __init__(self, store: Store, before_removal: Callable[[Moved], None], *, rewrite: bool, dry_run: bool) -> None:
        self._store = store
        self._rewrites, self._dry_run = rewrite and not dry_run, dry_run
        self._before_removal = before_removal
        self._tables: dict[int, References] = {}
        self._problems: list[str] = []
        self._freed = self._removed = self._rewritten = self._dropped = 0

    def run(self, also_keep: Iterable[References], without: frozenset[SnapshotId]) -> Collected:
        store = self._store
        for snapshot in () if self._dry_run else without:
            manifest_file.remove(store, snapshot)
        self._sweep()
        saved = [snapshot for snapshot in manifest_file.saved(store) if snapshot not in without]
        manifests = [manifest_file.load(store, snapshot) for snapshot in saved]
        used = mark(store, manifests)
        for references in also_keep:
            mark_references(used, references)
        faults.reach("collect-marked")
        self._remove_broken([number for number in store.numbers if number not in used])
        unused = [number for number, mask in used.items() if not mask.any()]
        twice = {number: table for number in unused if (table := self._elsewhere(number, used)).any()}
        self._remove([number for number in unused if number not in twice])
        if self._rewrites and twice:
            self._tables.update(twice)
            self._before_removal(Moved(twice))
            self._remove(list(twice))
        more_bytes = 0
        for group in self._groups(used):
            if self._rewrites:
                self._rewrite(group, used)
            else:
                more_bytes += sum(self._rubbish_bytes(number, used[number]) for number in group)
        return Collected(
            manifests=len(manifests),
            chunks_kept=sum(int(np.count_nonzero(mask)) for mask in used.values()),
            chunks_removed=self._dropped,
            freed_bytes=self._freed,
            packs_removed=self._removed,
            packs_rewritten=self._rewritten,
            moved=Moved(dict(self._tables)),
            more_bytes=more_bytes,
            problems=tuple(self._problems),
        )

    def _sweep(self) -> None:
        """What processes that died have left. Whoever writes these holds the lock, but for the working sets: those of
        snapshots that are there stay."""
        directory = self._store.directory
        there = set(manifest_file.saved(self._store))
        places = (directory, directory / "packs", directory / "manifests")
        parts = [part for place in places for part in place.glob(f"*{durable.PART}")]
        if (directory / "touched").is_dir():
            parts += [path for path in (directory / "touched").iterdir() if path.name.split(".")[0] not in there]
        for part in parts:
            self._freed += part.stat().st_size
            if not self._dry_run:
                part.unlink(missing_ok=True)

    def _groups(self, used: dict[int, Mask]) -> list[list[int]]:
        """Packs to be written anew: one by one, so that little room is needed, and the small ones together."""
        groups: list[list[int]] = []
        small: list[int] = []
        for number in self._store.numbers:
            if number not in used or not used[number].any():
                continue  # it goes whole
            pack = self._store.pack(number)
            if pack.data_bytes < SMALL_BYTES:
                small.append(number)
            elif _live_bytes(pack.index.offsets, used[number]) < (1 - RUBBISH) * pack.data_bytes:
                groups.append([number])
        wasteful = [n for n in small if not used[n].all()]
        chosen = small if len(small) >= MANY_SMALL else wasteful
        return [*groups, chosen] if chosen else groups

    def _rewrite(self, numbers: list[int], used: dict[int, Mask]) -> None:
        store = self._store
        writer = Writer(store, store.next_number())
        tables: dict[int, References] = {}
        try:
            for number in numbers:
                pack, kept = store.pack(number), np.flatnonzero(used[number])
                table = np.zeros(len(pack), np.uint64)
                for first in range(0, len(kept), _CHUNKS_TOGETHER):
                    positions = kept[first : first + _CHUNKS_TOGETHER]
                    pieces = pack.opened(positions.tolist())
                    table[positions] = writer.add_stored(
                        pack.index.hashes[positions], pieces, pack.index.sizes[positions]
                    )
                tables[number] = table
            writer.commit()
            for number in numbers:
                elsewhere = self._elsewhere(number, used, tables)
                tables[number] = np.where(tables[number] == 0, elsewhere, tables[number])
        except (Damaged, ResourceExhausted) as error:
            self._problems.append(str(error))
            return
        finally:
            writer.close()
        faults.reach("collect-moved")
        self._freed -= store.pack(writer.number).size_bytes
        self._rewritten += len(numbers)
        self._tables.update(tables)
        self._before_removal(Moved(tables))
        self._remove(numbers, {number: used[number] for number in numbers})

    def _elsewhere(
        self, number: int, used: Mapping[int, Mask], moved: Mapping[int, References] = MappingProxyType({})
    ) -> References:
        """For each position of a pack where the same chunk is that is kept, 0 for none: a collection that was ended
        between writing and removing leaves chunks twice, and somebody may hold references to these."""
        store = self._store
        found = store.find(store.pack(number).index.hashes)
        numbers, positions = packs_of(found), positions_of(found)
        for other in np.unique(numbers).tolist():
            which = np.flatnonzero(numbers == other)
            if other in moved:
                found[which] = moved[other][positions[which]]
            elif other in used:
                found[which] = np.where(used[other][positions[which]], found[which], np.uint64(0))
        return found

    def _remove(self, numbers: list[int], used: Mapping[int, Mask] | None = None) -> None:
        for number in numbers:
            pack = self._store.pack(number)
            self._freed += pack.size_bytes
            self._dropped += len(pack) - (int(np.count_nonzero(used[number])) if used else 0)
        self._removed += len(numbers) if used is None else 0
        if not self._dry_run:
            self._store.remove_packs(numbers)

    def _remove_broken(self, numbers: list[int]) -> None:
        """Packs that can't be opened, and that nothing needs."""
        self._freed += sum(pack_path(self._store.directory, number).stat().st_size for number in numbers)
        self._removed += len(numbers)
        if not self._dry_run:
            self._store.remove_packs(numbers)

    def _rubbish_bytes(self, number: int, used: Mask) -> int:
        pack = self._store.pack(number)
        return pack.data_bytes - _live_bytes(pack.index.offsets, used)


def _live_bytes(offsets: References, used: npt.NDArray[np.bool_]) -> int:
    return int((offsets[1:] - offsets[:-1])[used].sum())
