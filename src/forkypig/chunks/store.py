"""The directory of packs: finding chunks by their hashes, reading them, adding to them.

    packs/<16 hex digits>.pack    lock    key-id    next-pack

Reading takes no lock: packs appear whole, and are removed only after all they hold that matters is in a newer one.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forkypig.chunks import durable, faults, lock
from forkypig.chunks.crypt import NO_KEY_ID, Key
from forkypig.chunks.format import (
    HASH_BYTES,
    MAX_PACK,
    PAGE_BYTES,
    Hashes,
    References,
    is_packed,
    pack_number,
    pack_path,
    packs_of,
    positions_of,
)
from forkypig.chunks.pack import PackFile, check_key
from forkypig.chunks.pack_index import ABSENT, PackIndex
from forkypig.chunks.small_packs import SMALL_CHUNKS, SmallPacks
from forkypig.chunks.writer import Writer
from forkypig.errors import Damaged, NotFound, ResourceExhausted

KEY_VARIABLE = "FORKY_STORE_KEY"
_SMALL = 0  # stands for all small packs where a number of a pack would stand
_ZEROS = bytes(PAGE_BYTES)


def open_store(directory: Path) -> "Store":
    """The store, with the key that FORKY_STORE_KEY names. Raises InvalidRequest when that is not the store's."""
    key = os.environ.get(KEY_VARIABLE)
    return Store.open(directory, Key.load(Path(key)) if key else None)


class Store:
    """An open store. Belongs to one thread. Packs are opened, and their indexes verified, when they are first
    needed."""

    def __init__(self, directory: Path, key: Key | None) -> None:
        """Use `open`."""
        self.directory = directory
        self.key = key
        self.address_key = key.address_key if key else None
        self._packs: dict[int, PackFile] = {}
        self._numbers: list[int] = []
        self._small: SmallPacks | None = None  # made when something is searched
        self._large: list[int] = []
        self._sorted_out: set[int] = set()  # what these two know of
        self._hits: dict[int, int] = {}
        self.damaged: dict[int, str] = {}  # packs that can't be opened, and why: what they hold is missing

    @classmethod
    def open(cls, directory: Path, key: Key | None = None) -> "Store":
        """Opens the store in a directory; makes it where there is none. Raises InvalidRequest for the wrong key."""
        store = cls(directory, key)
        (directory / "packs").mkdir(parents=True, exist_ok=True, mode=0o700)
        (directory / "manifests").mkdir(exist_ok=True, mode=0o700)
        store._check_key()
        store.refresh()
        return store

    def _check_key(self) -> None:
        path = self.directory / "key-id"
        if not path.exists():
            durable.write_whole(path, (self.key.id if self.key else NO_KEY_ID).hex().encode() + b"\n")
        try:
            found = bytes.fromhex(path.read_bytes()[:64].decode("ascii").strip())
        except ValueError as error:
            raise Damaged(f"{path} is not the id of a key") from error
        check_key(found, self.key, f"the store in {self.directory}")

    def refresh(self) -> None:
        """Sees packs that others added, and lets those go that are no longer there."""
        names = [entry.name for entry in (self.directory / "packs").iterdir()]
        numbers = sorted(number for name in names if (number := pack_number(name)) is not None)
        if not self._sorted_out <= set(numbers):
            self._small = None
        self._numbers = numbers
        for number in self._packs.keys() - set(numbers):
            self._packs.pop(number).close()
        if self.damaged:  # it may have been brought back
            self.damaged.clear()
            self._small = None

    @property
    def numbers(self) -> list[int]:
        """The numbers of all packs, ascending."""
        return list(self._numbers)

    def pack(self, number: int) -> PackFile:
        """An open pack. Raises NotFound when it is not there, Damaged."""
        found = self._packs.get(number)
        if found is None:
            try:
                found = PackFile(pack_path(self.directory, number), self.key)
            except FileNotFoundError as error:
                raise NotFound("pack", f"{number:016x}", "look at `forky fsck`") from error
            self._packs[number] = found
        return found

    def find(self, hashes: Hashes) -> References:
        """The reference to each hash, from an array of shape (n, 32); 0 for what is not in the store.

        Packs that had most of what was asked lately are looked into first: a snapshot's pages are mostly in a few. A
        pack whose index is damaged has nothing: what else the store holds stays usable."""
        small = self._sort_out()
        found = np.zeros(len(hashes), np.uint64)
        left = np.arange(len(hashes))
        for number in sorted([_SMALL, *self._large], key=lambda number: (-self._hits.get(number, 0), -number)):
            if not len(left):
                break
            if number == _SMALL:
                references = small.find(hashes[left])
            else:
                positions = self._packs[number].index.find(hashes[left])
                references = np.where(positions == ABSENT, 0, positions | number << 32).astype(np.uint64)
            here = references != 0
            hits = int(np.count_nonzero(here))
            self._hits[number] = self._hits.get(number, 0) // 2 + hits
            found[left[here]] = references[here]
            left = left[~here]
        return found

    def _sort_out(self) -> SmallPacks:
        """Opens all packs that it does not know of: the small ones are searched together."""
        if self._small is None:
            self._small, self._large, self._sorted_out = SmallPacks({}), [], set()
        if len(self._sorted_out) == len(self._numbers):
            return self._small
        small: dict[int, PackIndex] = {}
        for number in self._numbers:
            if number in self._sorted_out:
                continue
            try:
                pack = self.pack(number)
            except NotFound:  # collected since we last looked
                continue
            except Damaged as error:
                self.damaged[number] = str(error)
                continue
            if len(pack) <= SMALL_CHUNKS:
                small[number] = pack.index
            else:
                self._large.append(number)
        self._small.add(small)
        self._sorted_out = set(self._numbers)
        return self._small

    def read(self, references: Sequence[int]) -> list[bytes]:
        """The content of each chunk, verified; for reference 0 a page of zeros. Raises Damaged, NotFound.

        References that follow one another in a pack are read at once."""
        contents: list[bytes] = []
        first = 0
        while first < len(references):
            number = references[first] >> 32
            after = first + 1
            while after < len(references) and references[after] >> 32 == number:
                after += 1
            part = references[first:after]
            if number:
                contents += self._pack_of(number).read_each([self._position(number, one) for one in part])
            elif any(part):
                raise Damaged(f"{max(part):#x} is not a reference to a chunk")
            else:
                contents += [_ZEROS] * len(part)
            first = after
        return contents

    def will_need(self, references: References) -> None:
        """Chunks that are read soon: the kernel begins with those that lie on the disk. Raises Damaged, NotFound."""
        for _, pack, positions in self._by_pack(references[is_packed(references)]):
            pack.will_need(positions.tolist())

    def _pack_of(self, number: int) -> PackFile:
        if not 0 < number <= MAX_PACK:
            raise Damaged(f"{number:#x} is not the number of a pack: only packed pages are in the store")
        return self.pack(number)

    def _position(self, number: int, reference: int) -> int:
        position = reference & 0xFFFFFFFF
        if position >= len(self._packs[number]):
            raise Damaged(f"pack {number:016x} has no position {position}")
        return position

    def hashes(self, references: References) -> Hashes:
        """The hash of each chunk; all references are packed. Raises Damaged, NotFound."""
        found = np.empty((len(references), HASH_BYTES), np.uint8)
        for where, pack, positions in self._by_pack(references):
            found[where] = pack.index.hashes[positions]
        return found

    def lengths(self, references: References) -> npt.NDArray[np.uint32]:
        """The length of each chunk's content; all references are packed. Raises Damaged, NotFound."""
        found = np.empty(len(references), np.uint32)
        for where, pack, positions in self._by_pack(references):
            found[where] = pack.index.lengths[positions]
        return found

    def _by_pack(
        self, references: References
    ) -> Iterator[tuple[npt.NDArray[np.int64], PackFile, npt.NDArray[np.int64]]]:
        if not is_packed(references).all():
            raise Damaged("a reference is not to a chunk of a pack")
        numbers, positions = packs_of(references), positions_of(references)
        for number in np.unique(numbers).tolist():
            pack = self._pack_of(number)
            where = np.flatnonzero(numbers == number)
            if int(positions[where].max()) >= len(pack):
                raise Damaged(f"pack {number:016x} has no position {int(positions[where].max())}")
            yield where, pack, positions[where]

    @contextlib.contextmanager
    def writer(self, *, wait: bool = True) -> Iterator[Writer]:
        """Adds to the store, alone: nobody else adds or collects until the context ends. So save the manifest that
        names what was added before that, after `commit`. Leaving without commit leaves nothing. Raises Busy without
        `wait`, ResourceExhausted."""
        with self.locked(wait=wait):
            for part in (self.directory / "packs").glob(f"*{durable.PART}"):
                part.unlink()  # of a process that died: we hold the lock
            writer = Writer(self, self.next_number())
            try:
                yield writer
            finally:
                writer.close()

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Nobody adds or collects meanwhile; our own list of packs is fresh. Raises Busy without `wait`."""
        with lock.exclusive(self.directory / "lock", wait):
            self.refresh()
            yield

    def next_number(self) -> int:
        """A number that no pack has had. The lock is held."""
        path = self.directory / "next-pack"
        try:
            reserved = int(path.read_bytes()[:64].decode("ascii"), 16) if path.exists() else 1
        except ValueError as error:
            raise Damaged(f"{path} is not a number") from error
        number = max(reserved, self._numbers[-1] + 1 if self._numbers else 1)
        if number > MAX_PACK:
            raise ResourceExhausted(f"the store in {self.directory} has had as many packs as it can number")
        return number

    def remove_packs(self, numbers: Sequence[int]) -> None:
        """Removes packs for good; their numbers are never used again. The lock is held."""
        if not numbers:
            return
        path = self.directory / "next-pack"
        durable.write_whole(path, f"{self.next_number():x}\n".encode())
        faults.reach("collect-numbered")
        for number in numbers:
            pack_path(self.directory, number).unlink(missing_ok=True)
            faults.reach("collect-pack-removed")
        durable.sync_directory(self.directory / "packs")
        self.refresh()

    def close(self) -> None:
        """Closes the packs."""
        for pack in self._packs.values():
            pack.close()
        self._packs.clear()
