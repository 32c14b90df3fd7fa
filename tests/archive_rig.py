"""Two homes with a chunk store and images each, and snapshots that are made up, for the tests of what travels."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forkypig import signatures
from forkypig.archive import exporting, importing, tape
from forkypig.archive.head import About
from forkypig.archive.pins import pinning
from forkypig.archive.reporting import Meter
from forkypig.chunks import manifest_file
from forkypig.chunks.crypt import Key
from forkypig.chunks.format import BASE, PAGE_BYTES
from forkypig.chunks.manifest import BaseImage, Manifest, Needs, make_device_state
from forkypig.chunks.section import make_section
from forkypig.chunks.store import Store
from forkypig.images.manifest import DISK, FILES, FileEntry
from forkypig.images.manifest import Manifest as ImageManifest
from forkypig.images.store import ImageStore
from forkypig.model import Shape, SnapshotId
from tests.chunks_rig import DEVICES, NEEDS, pages, snapshot_id

MEMORY_MIB, DISK_MIB = 3, 6
ABOUT = About(network="tap", mtu=1500, tag="good", message="first\nlight", created_us=17, pause_ms=12.5)


@dataclass
class Home:
    """A store and images."""

    directory: Path
    store: Store
    images: ImageStore

    def snapshots(self) -> list[SnapshotId]:
        return manifest_file.saved(self.store)

    def files(self) -> set[str]:
        """All that is in the store and among the images, but for what is there from the start."""
        every = (path.relative_to(self.directory) for path in self.directory.rglob("*") if path.is_file())
        return {str(path) for path in every if path.name not in ("lock", "key-id", "next-pack")}


def new_home(directory: Path, key: Key | None = None) -> Home:
    return Home(directory, Store.open(directory / "store", key), ImageStore(directory / "images"))


def add_image(home: Home) -> ImageManifest:
    """A disk of 5 MiB, with holes."""
    directory = home.images.new_build()
    disk = bytearray(5 << 20)
    disk[1 << 20 : (1 << 20) + 50_000] = pages(99, 13).tobytes()[:50_000]
    disk[-100:] = b"e" * 100
    contents = {DISK: bytes(disk), "vmlinux": b"kernel" * 1000, "initrd": b""}
    for name in FILES:
        (directory / name).write_bytes(contents[name])
    manifest = ImageManifest(
        name="little",
        description="made up",
        recipe="00" * 32,
        disk_format="raw",
        cmdline="console=ttyS0",
        kernel_release="6.1",
        stored_bytes=12345,
        created_us=1,
        files={n: FileEntry(len(contents[n]), hashlib.sha256(contents[n]).hexdigest()) for n in FILES},
        packages=("a=1", "b=2"),
    )
    home.images.publish(directory, manifest)
    return manifest


def memory_of(seed: int) -> npt.NDArray[np.uint8]:
    return pages(seed, MEMORY_MIB << 8)


def save(home: Home, number: int, memory: npt.NDArray[np.uint8], *, cpu_model: str = NEEDS.cpu_model) -> Manifest:
    """Packs a snapshot with this memory; its disk is the image's but for some pages."""
    image = home.images.manifests()[0]
    store = home.store
    with store.writer() as writer:
        found = writer.add(memory)
        disk = np.full(DISK_MIB << 8, BASE, np.uint64)
        disk[::7] = 0
        disk[9] = found[0]
        made = Manifest(
            snapshot=snapshot_id(number),
            parent=snapshot_id(number - 1) if number else None,
            created_us=1_700_000_000_000_000 + number,
            shape=Shape(1, MEMORY_MIB, DISK_MIB),
            needs=Needs(
                qemu_build=NEEDS.qemu_build,
                machine_type=NEEDS.machine_type,
                cpu_model=cpu_model,
                accelerator=NEEDS.accelerator,
            ),
            base=BaseImage(id=image.image_id, sha256=image.files[DISK].sha256),
            devices=make_device_state(writer, DEVICES + bytes([number % 256])),
            memory=make_section(writer, found, len(memory)),
            disk=make_section(writer, disk, DISK_MIB << 20),
        )
        writer.commit()
        manifest_file.save(store, made)
    return made


def quiet() -> Meter:
    return Meter(lambda step, done, total: None)


def export(home: Home, number: int, *, with_image: bool = True, key: Path | None = None, about: About = ABOUT) -> bytes:
    """The whole file."""
    with pinning(home.store) as pins:
        made = exporting.export(
            home.store, home.images, pins, snapshot_id(number), about, with_image=with_image, meter=quiet()
        )
        head = [tape.whole(exporting.HEAD, made.head)]
        if key is not None:
            head.append(tape.whole(exporting.SIGNATURE, signatures.sign(key, made.head)))
        return b"".join((*head, *made.rest))


def import_(home: Home, content: bytes, *, known: Sequence[str] = (), trusted: bytes = b"") -> importing.Arrived:
    with pinning(home.store) as pins:
        return importing.import_(
            io.BytesIO(content), home.store, home.images, pins, known=known, trusted=trusted, meter=quiet()
        )


def assert_same(home: Home, number: int, memory: npt.NDArray[np.uint8]) -> None:
    """A freshly opened store has everything of the snapshot."""
    store = Store.open(home.store.directory, home.store.key)
    manifest = manifest_file.load(store, snapshot_id(number))
    assert b"".join(store.read(manifest.memory.expand(store).tolist())) == memory.tobytes()
    assert store.read([int(manifest.disk.expand(store)[9])]) == [memory[:PAGE_BYTES].tobytes()]
    assert manifest.devices.read(store) == DEVICES + bytes([number % 256])
    store.close()


def packs_bytes(home: Home) -> int:
    return sum(path.stat().st_size for path in (home.store.directory / "packs").glob("*.pack"))
