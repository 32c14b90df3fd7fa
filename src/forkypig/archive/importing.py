"""Takes a snapshot in from a file that anybody may have made.

Everything is verified as it is read, the manifest is written last, and until then nothing here has changed but chunks
that nothing names, which `gc` takes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import IO

from forkypig import signatures
from forkypig.archive import image_files, needed, tape
from forkypig.archive.exporting import DATA, HEAD, INDEX, MANIFEST, SIGNATURE
from forkypig.archive.head import MOST_BYTES, MOST_MANIFEST_BYTES, Head, decode_head, digest
from forkypig.archive.intake import Intake
from forkypig.archive.parcel import ParcelIndex
from forkypig.archive.pins import Pins
from forkypig.archive.reporting import Meter
from forkypig.chunks import faults, manifest_file
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, InvalidRequest, NotPossibleNow
from forkypig.images.store import ImageStore

_MOST_INDEX = 1 << 33
_MOST_DATA = 1 << 45
_MOST_SIGNATURE = 1 << 10


@dataclass(frozen=True, slots=True)
class Arrived:
    """A snapshot that is in the store now, or was already."""

    head: Head
    manifest: Manifest | None  # None: it was here already
    new_chunks: int = 0
    new_bytes: int = 0


def import_(
    stream: IO[bytes],
    store: Store,
    images: ImageStore,
    pins: Pins,
    *,
    known: Collection[str],
    trusted: bytes,
    meter: Meter,
) -> Arrived:
    """`known`: the snapshots that are here. `trusted`: the public key that must have signed it; b"": any or none.

    Raises Damaged, InvalidRequest (a newer format, the key of the store, the signature), NotPossibleNow (the image is
    missing, another snapshot has the id), ResourceExhausted."""
    meter.begin("importing")
    reader = tape.Reader(stream)
    content = reader.content(HEAD, MOST_BYTES)
    signed = reader.content(SIGNATURE, _MOST_SIGNATURE) if reader.peek() == SIGNATURE else b""
    if trusted and not signed:
        raise InvalidRequest("this export is not signed, and a signature is asked for (--trust): nothing was imported")
    if trusted:
        signatures.check(signed, content, trusted)
    head = decode_head(content)
    if head.snapshot in known:
        check_same(store, head)
        return Arrived(head, None)
    manifest = head.read_manifest(reader.content(MANIFEST, MOST_MANIFEST_BYTES), store.key)
    _image(reader, images, head, manifest, meter)
    intake = Intake(store, pins)
    _chunks(reader, store, head, intake, meter)
    keep(store, manifest, meter)
    return Arrived(head, manifest, intake.new_chunks, intake.new_bytes)


def check_same(store: Store, head: Head) -> None:
    """The snapshot is here. Raises NotPossibleNow when it is another one by the same id."""
    path = manifest_file.manifest_path(store, head.snapshot)
    if path.exists() and digest(path.read_bytes()) != head.manifest:
        raise NotPossibleNow(
            f"another snapshot with the id {head.snapshot} is here already: nothing was changed; "
            f"remove it first if you want this one (forky rm {head.snapshot})"
        )


def check_image(images: ImageStore, head: Head, manifest: Manifest, where: str) -> bool:
    """Whether the image that the snapshot stands on is here. Raises NotPossibleNow when it is neither here nor comes
    along, Damaged when it is another."""
    if manifest.base is None or head.image is None:
        return True
    if (images.root / head.image).is_dir():
        image_files.check_disk(images.manifest(head.image), manifest.base.sha256)
        return True
    if not head.has_image:
        raise NotPossibleNow(
            f"snapshot {head.snapshot} stands on image {head.image}, which is neither here nor {where}: "
            f"export it with its image, or import one that has it first"
        )
    return False


def _image(reader: tape.Reader, images: ImageStore, head: Head, manifest: Manifest, meter: Meter) -> None:
    if check_image(images, head, manifest, "in the file"):
        image_files.skip(reader)
        return
    assert head.image is not None
    assert manifest.base is not None
    meter.begin("importing the image")
    forget = head.about.forget_files
    image_files.read(reader, images, head.image, head.image_sha256, manifest.base.sha256, forget, meter.advance)


def _chunks(reader: tape.Reader, store: Store, head: Head, intake: Intake, meter: Meter) -> None:
    content = reader.content(INDEX, _MOST_INDEX)
    if digest(content) != head.index:
        raise Damaged("the index of this export is another than its head says: it was altered or is damaged")
    index = ParcelIndex(content, store.key, "this export")
    if reader.open(DATA, _MOST_DATA) != index.data_bytes:
        raise Damaged("the data of this export is not as long as its index says")
    meter.begin("importing", index.data_bytes)
    hashes, sizes = index.index.hashes, index.index.sizes.tolist()
    for position, length in enumerate(index.stored_lengths().tolist()):
        piece = reader.read(length)
        intake.add(hashes[position].tobytes(), index.opened(position, piece), sizes[position])
        meter.advance(length)
    reader.finish()
    intake.flush()


def keep(store: Store, manifest: Manifest, meter: Meter) -> None:
    """Makes a snapshot of which all is in the store a durable one. Raises Damaged when something is missing."""
    meter.begin("verifying")
    with store.locked():
        needed.check_complete(store, manifest)
        faults.reach("complete")
        manifest_file.save(store, manifest)
