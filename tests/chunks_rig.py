"""A store with snapshots of pages that are made up, for the tests of the chunk store."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from forkypig.chunks import manifest_file
from forkypig.chunks.crypt import Key
from forkypig.chunks.format import BASE, PAGE_BYTES, References
from forkypig.chunks.manifest import BaseImage, Manifest, Needs, make_device_state
from forkypig.chunks.section import make_section
from forkypig.chunks.store import Store
from forkypig.model import Shape, SnapshotId

NEEDS = Needs(qemu_build="7.2.0 (Debian)", machine_type="pc-q35-7.2", cpu_model="max", accelerator="tcg")
BASE_IMAGE = BaseImage(id="i-0123456789ab", sha256="ab" * 32)
DEVICES = b"QEVM device state" * 5000  # more than one piece
DISK_PAGES = 1500


def snapshot_id(number: int) -> SnapshotId:
    """The id of the snapshot of this number."""
    return SnapshotId(f"s-{number:012x}")


def pages(seed: int, count: int) -> npt.NDArray[np.uint8]:
    """Pages that compress, every tenth of which does not, with some zeros and some twice. One buffer."""
    random = np.random.default_rng(seed)
    made = random.integers(0, 5, (count, PAGE_BYTES), np.uint8)
    made[::10] = random.integers(0, 256, (len(made[::10]), PAGE_BYTES), np.uint8)
    made[3::17] = 0
    made[5::19] = made[0]
    return made.reshape(-1)


def save_snapshot(store: Store, number: int, memory: npt.NDArray[np.uint8]) -> References:
    """Packs a snapshot with this memory; returns its references. Its disk is the base image with one page of the
    memory."""
    with store.writer() as writer:
        found = writer.add(memory)
        disk = np.full(DISK_PAGES, BASE, np.uint64)
        disk[::7] = 0
        disk[9] = found[0]
        made = Manifest(
            snapshot=snapshot_id(number),
            parent=snapshot_id(number - 1) if number else None,
            created_us=1_700_000_000_000_000 + number,
            shape=Shape(),
            needs=NEEDS,
            base=BASE_IMAGE,
            devices=make_device_state(writer, DEVICES + bytes([number % 256])),
            memory=make_section(writer, found, len(memory)),
            disk=make_section(writer, disk, DISK_PAGES * PAGE_BYTES),
            labels={"message": f"number {number} «é»"},
        )
        writer.commit()
        manifest_file.save(store, made)
    return found


def assert_memory_readable(directory: Path, number: int, memory: npt.NDArray[np.uint8], key: Key | None = None) -> None:
    """A freshly opened store gives the snapshot's memory back."""
    store = Store.open(directory, key)
    references = manifest_file.load(store, snapshot_id(number)).memory.expand(store)
    assert b"".join(store.read(references.tolist())) == memory.tobytes()
    store.close()


def assert_readable(directory: Path, number: int, memory: npt.NDArray[np.uint8], key: Key | None = None) -> None:
    """A freshly opened store gives everything of the snapshot back."""
    assert_memory_readable(directory, number, memory, key)
    store = Store.open(directory, key)
    got = manifest_file.load(store, snapshot_id(number))
    disk = got.disk.expand(store)
    assert disk[0] == 0 and disk[1] == BASE
    assert store.read([int(disk[9])]) == [memory[:PAGE_BYTES].tobytes()]
    assert got.devices.read(store) == DEVICES + bytes([number % 256])
    store.close()
