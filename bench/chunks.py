"""The chunk store on the memory of a real guest: which size of chunk is best, and how fast packing and a fault are.

For each size the same content is hashed, compressed and read back by the same few calls that the store makes, so that
only the size differs; sizes take turns, as the host's load drifts. CPU time of one core where it says so, else
elapsed time.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from bench.instance import checked
from bench.session import Session
from forkypig.chunks.coding import LEVEL
from forkypig.chunks.format import HASH_BYTES, PAGE_BYTES
from forkypig.chunks.store import Store

SECTION, STORE = "chunk sizes", "chunk store"
SIZES_KIB = (4, 8, 16, 32, 64, 128)
FAULT_BYTES = 32 << 10  # the pager's read-ahead
_INDEX_BYTES = 56 + HASH_BYTES  # per chunk: in the pack's index and in the block
_DICTIONARY_BYTES = 64 << 10
_MIB = 1 << 20
# The guest reads some thousands of files and starts Python; then, for the second snapshot, writes a file of 4 MiB.
_FIRST = (
    "find / -xdev -type f -size -200k 2>/dev/null | head -4000 | xargs cat >/dev/null; "
    "python3 -c 'import json, asyncio, email, http.server'"
)
_THEN = "import json; open('/root/x', 'w').write(json.dumps([str(i) * 20 for i in range(60000)])[: 4 << 20])"

Memory = npt.NDArray[np.uint8]


async def run(session: Session) -> None:
    """Two snapshots of one guest, then all sizes."""
    one, two = await _memories(session)
    await asyncio.to_thread(_sizes, session, one, two)
    await asyncio.to_thread(_store, session, one, two)


async def _memories(session: Session) -> tuple[Memory, Memory]:
    machine = await session.forky.run()
    found: list[Memory] = []
    for command in (("sh", "-c", _FIRST), ("python3", "-c", _THEN)):
        await checked(machine, *command)
        snapshot = await machine.snapshot()
        path = session.instance.settings.memory / snapshot.id / "memory"
        found.append(await asyncio.to_thread(np.fromfile, path, np.uint8))
    await session.instance.clear()
    return found[0], found[1]


@dataclass(slots=True)
class Coded:
    """The chunks of a memory at one size: which are not zeros, and what they become."""

    size: int
    used: npt.NDArray[np.int64]
    content: memoryview
    compressor: zstandard.ZstdCompressor
    decompressor: zstandard.ZstdDecompressor
    hashes: list[bytes]
    frames: list[bytes]

    @classmethod
    def make(cls, memory: Memory, size: int, dictionary: zstandard.ZstdCompressionDict | None) -> "Coded":
        """Hashes and compresses."""
        chunks = memory.reshape(-1, size)
        used = np.flatnonzero(chunks.view(np.uint64).any(axis=1))
        content = chunks[used].data.cast("B")
        compressor = zstandard.ZstdCompressor(level=LEVEL, dict_data=dictionary)
        coded = cls(size, used, content, compressor, zstandard.ZstdDecompressor(dict_data=dictionary), [], [])
        coded.code()
        return coded

    def code(self) -> None:
        """What packing does per chunk."""
        size, content = self.size, self.content
        self.hashes = [blake3(content[at : at + size]).digest() for at in range(0, len(content), size)]
        segments = np.full((len(self.used), 2), size, np.uint64)
        segments[:, 0] = np.arange(len(self.used)) * size
        several = zstandard.BufferWithSegments(content, segments.tobytes())
        self.frames = [frame.tobytes() for frame in self.compressor.multi_compress_to_buffer(several, threads=0)]

    def stored(self, unless: "Coded | None" = None) -> int:
        """Bytes on disk of chunks that neither come twice nor are in another memory."""
        lengths = dict(
            zip(self.hashes, (min(len(frame), self.size) + _INDEX_BYTES for frame in self.frames), strict=True)
        )
        there = set(unless.hashes) if unless else set()
        return sum(length for address, length in lengths.items() if address not in there)

    def dirty_bytes(self, memory: Memory, pages: list[int]) -> float:
        """Mean bytes on disk for one page of which the guest changed 64 bytes."""
        total = 0
        for page in pages:
            start = page * PAGE_BYTES // self.size * self.size
            chunk = memory[start : start + self.size].copy()
            at = page * PAGE_BYTES - start + 1024
            chunk[at : at + 64] = np.frombuffer(random.Random(page).randbytes(64), np.uint8)
            total += min(len(self.compressor.compress(chunk.data)), self.size) + _INDEX_BYTES
        return total / len(pages)

    def faults(self, file: Path, times: int) -> list[float]:
        """µs to read, decompress and verify what a read of 32 KiB needs, at random places in use; the file is in the
        page cache."""
        file.write_bytes(b"".join(self.frames))
        ends = np.cumsum([len(frame) for frame in self.frames])
        together = max(1, FAULT_BYTES // self.size)
        randoms, taken = random.Random(1), []
        with file.open("rb", buffering=0) as opened:
            for _ in range(times):
                first = randoms.randrange(len(self.frames) - together)
                began = time.perf_counter()
                start = int(ends[first]) - len(self.frames[first])
                opened.seek(start)
                data = opened.read(int(ends[first + together - 1]) - start)
                for number in range(first, first + together):
                    frame = data[int(ends[number]) - len(self.frames[number]) - start : int(ends[number]) - start]
                    content = self.decompressor.decompress(frame, max_output_size=self.size)
                    if blake3(content).digest() != self.hashes[number]:
                        raise AssertionError("what was read is not what was written")
                taken.append((time.perf_counter() - began) * 1e6)
        return taken


def _sizes(session: Session, one: Memory, two: Memory) -> None:
    pages = np.flatnonzero(one.reshape(-1, PAGE_BYTES).view(np.uint64).any(axis=1))
    in_use = len(pages) * PAGE_BYTES
    scattered = random.Random(2).sample(pages.tolist(), session.times(1000, 200))
    samples = [one[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes() for page in pages[::8].tolist()]
    trained = zstandard.train_dictionary(_DICTIONARY_BYTES, samples)
    kinds: list[tuple[int, str, zstandard.ZstdCompressionDict | None]] = [(kib, "no", None) for kib in SIZES_KIB]
    kinds.append((4, "64 KiB", trained))
    coded = [(kib, words, Coded.make(one, kib << 10, trained)) for kib, words, trained in kinds]
    for (kib, words, first), (_, _, trained) in zip(coded, kinds, strict=True):
        second = Coded.make(two, kib << 10, trained)
        add = _adder(session, kib, words)
        add("memory in use / bytes stored", "×", [in_use / first.stored()])
        add("first snapshot", "MiB", [first.stored() / _MIB])
        add("second snapshot, more", "MiB", [second.stored(first) / _MIB])
        add("one changed page, scattered", "bytes", [first.dirty_bytes(one, scattered)])
    speeds: list[list[float]] = [[] for _ in coded]
    for _ in range(session.times(5, 2)):
        for (_, _, one_coded), found in zip(coded, speeds, strict=True):
            began = time.process_time()
            one_coded.code()
            found.append(in_use / _MIB / (time.process_time() - began))
    for (kib, words, _), found in zip(coded, speeds, strict=True):
        _adder(session, kib, words)("hash and compress, one core", "MiB/s", found)
    with tempfile.TemporaryDirectory() as directory:
        for kib, words, one_coded in coded:
            taken = one_coded.faults(Path(directory) / "frames", session.times(2000, 300))
            _adder(session, kib, words)("fault of 32 KiB", "µs", taken)


def _adder(session: Session, kib: int, words: str) -> Callable[[str, str, list[float]], object]:
    return lambda quantity, unit, samples: session.results.add(
        SECTION, quantity, unit, samples, chunk_kib=kib, dictionary=words
    )


def _store(session: Session, one: Memory, two: Memory) -> None:
    """The store itself: two snapshots into a fresh store, and faults of eight pages, verified."""
    found: dict[tuple[str, str, str], list[float]] = {}
    faults: list[float] = []
    for _ in range(session.times(5, 2)):
        with tempfile.TemporaryDirectory() as directory:
            store = Store.open(Path(directory))
            for name, memory in (("first", one), ("second", two)):
                began, cpu_began = time.perf_counter(), time.process_time()
                with store.writer() as writer:
                    references = writer.add(memory)
                    writer.commit()
                taken, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
                changed = (writer.pages - writer.zero_pages) * PAGE_BYTES / _MIB
                for quantity, unit, value in (
                    ("packing, memory in use", "MiB/s", changed / taken),
                    ("the same by one core's CPU time", "MiB/s", changed / cpu_s),
                    ("pack", "MiB", writer.stored_bytes / _MIB),
                ):
                    found.setdefault((quantity, unit, name), []).append(value)
            faults += _store_faults(session, store, references[references != 0].tolist())
            store.close()
    for (quantity, unit, name), values in found.items():
        session.results.add(STORE, quantity, unit, values, snapshot=name)
    session.results.add(STORE, "fault of 32 KiB, verified", "µs", faults)


def _store_faults(session: Session, store: Store, references: list[int]) -> list[float]:
    pages, randoms, taken = FAULT_BYTES // PAGE_BYTES, random.Random(3), []
    for _ in range(session.times(2000, 300)):
        first = randoms.randrange(len(references) - pages)
        began = time.perf_counter()
        store.read(references[first : first + pages])
        taken.append((time.perf_counter() - began) * 1e6)
    return taken
