"""A packed snapshot as one file: `head`, `signature` if it is signed, `manifest`, the image's files, `index`, `data`.

The head is handed out by itself, so that whoever has the key can sign it and write both; the daemons see no secret key.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from forkypig.archive import image_files, needed, tape
from forkypig.archive.head import About, Head, digest
from forkypig.archive.parcel import Parcel
from forkypig.archive.pins import Pins
from forkypig.archive.reporting import Meter
from forkypig.chunks import faults, manifest_file
from forkypig.chunks.format import Hashes, References
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.manifest_coding import encode
from forkypig.chunks.store import Store
from forkypig.errors import Damaged
from forkypig.images.store import ImageStore
from forkypig.model import SnapshotId

HEAD, SIGNATURE, MANIFEST, INDEX, DATA = "head", "signature", "manifest", "index", "data"


@dataclass(frozen=True, slots=True)
class Export:
    """What is to be written: the head, and all that comes after it."""

    head: bytes
    rest: Iterator[bytes]


def export(
    store: Store, images: ImageStore, pins: Pins, snapshot: SnapshotId, about: About, *, with_image: bool, meter: Meter
) -> Export:
    """Raises NotFound (it is not packed), Damaged."""
    meter.begin("looking up what it consists of")
    manifest = manifest_file.load(store, snapshot)
    content = encode(manifest, store.key)
    parcel = Parcel(store, stored(store, pins, manifest))
    index = parcel.index()
    head = describe(manifest, content, images, about, index=digest(index), has_image=with_image)
    return Export(head.encode(), _rest(content, images, head, parcel, index, meter))


def describe(
    manifest: Manifest, content: bytes, images: ImageStore, about: About, *, index: str = "", has_image: bool = False
) -> Head:
    """The head of a snapshot. Raises NotFound when its image is not here."""
    base = manifest.base
    image = images.manifest(images.get(base.id).id) if base else None
    return Head(
        snapshot=manifest.snapshot,
        manifest=digest(content),
        index=index,
        image=image.image_id if image else None,
        image_sha256=image.sha256 if image else "",
        has_image=has_image and image is not None,
        about=about,
    )


def stored(store: Store, pins: Pins, manifest: Manifest) -> References:
    """Where all chunks of a snapshot are, what the manifest names itself first, pages as they lie; and keeps them there
    until the transfer ends. Raises Damaged when one is missing."""
    roots = needed.roots(manifest)
    pins.add(roots)
    with store.locked():
        first = _found(store, roots)
    pages = needed.pages(store, manifest)
    pins.add(pages)
    with store.locked():
        found = _found(store, pages)
    return np.concatenate([np.unique(first), np.setdiff1d(found, first)])


def _found(store: Store, hashes: Hashes) -> References:
    found = store.find(hashes)
    missing = int(np.count_nonzero(found == 0))
    if missing:
        raise Damaged(f"{missing} chunks of the snapshot are not in the store: see `forky fsck`")
    return found


def _rest(
    manifest: bytes, images: ImageStore, head: Head, parcel: Parcel, index: bytes, meter: Meter
) -> Iterator[bytes]:
    image_bytes = 0
    if head.has_image and head.image:
        image_bytes = sum(entry.size_bytes for entry in images.manifest(head.image).files.values())
    meter.begin("exporting", parcel.data_bytes + image_bytes)
    yield tape.whole(MANIFEST, manifest)
    if head.has_image and head.image:
        yield from image_files.write(images, head.image, meter.advance)
    yield tape.whole(INDEX, index)
    yield tape.header(DATA, parcel.data_bytes)
    for piece in parcel.data():
        yield piece
        meter.advance(len(piece))
        faults.reach("export-data")
    yield tape.padding(parcel.data_bytes)
    yield tape.END
