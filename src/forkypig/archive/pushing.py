"""Sends a snapshot to an object store: the chunks that are not there yet, in packs of some MiB, and its manifest last.

Each pack is usable as soon as it is there: a push that was interrupted goes on where it was, and two at once send some
chunks twice and lose none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forkypig.archive import image_files, tape
from forkypig.archive.exporting import describe, stored
from forkypig.archive.head import MOST_BYTES, About, Head, decode_head
from forkypig.archive.parcel import Parcel
from forkypig.archive.pins import Pins
from forkypig.archive.remote import Remote
from forkypig.archive.remote_index import RemoteIndex
from forkypig.archive.reporting import Meter
from forkypig.chunks import faults, manifest_file
from forkypig.chunks.format import References, packs_of, positions_of
from forkypig.chunks.manifest_coding import encode
from forkypig.chunks.pack_index import ABSENT
from forkypig.chunks.store import Store
from forkypig.errors import NotPossibleNow
from forkypig.images.store import ImageStore
from forkypig.model import ImageId, SnapshotId
from forkypig.model.ids import is_id

PACK_BYTES = 32 << 20
_MOST_TAG = 100


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did."""

    head: Head
    was_there: bool
    new_chunks: int = 0
    sent_bytes: int = 0


def push(
    store: Store,
    images: ImageStore,
    pins: Pins,
    remote: Remote,
    snapshot: SnapshotId,
    about: About,
    cache: Path,
    meter: Meter,
) -> Pushed:
    """Raises NotFound (it is not packed), NotPossibleNow (another snapshot has the id or the tag there), Damaged, and
    what `Remote` raises."""
    meter.begin("looking up what is there")
    manifest = manifest_file.load(store, snapshot)
    content = encode(manifest, store.key)
    head = describe(manifest, content, images, about, has_image=True)
    there = remote.get(f"snapshots/{snapshot}.json", MOST_BYTES)
    if there is not None and decode_head(there).manifest != head.manifest:
        raise NotPossibleNow(f"another snapshot with the id {snapshot} is in {remote.url} already: push it elsewhere")
    _check_tag(remote, head)
    chunks = sent = 0
    if there is None:
        chunks, sent = _send(store, remote, stored(store, pins, manifest), cache, meter)
        if head.image:
            sent += _send_image(images, remote, head.image, meter)
        remote.put(f"manifests/{snapshot}.manifest", content)
        faults.reach("push-manifest")
        remote.put(f"snapshots/{snapshot}.json", head.encode())
        faults.reach("push-head")
    if about.tag:
        remote.put(f"tags/{about.tag}", snapshot.encode())
    return Pushed(head, there is not None, chunks, sent)


def _check_tag(remote: Remote, head: Head) -> None:
    if not head.about.tag:
        return
    holder = remote.get(f"tags/{head.about.tag}", _MOST_TAG)
    if holder is not None and holder != head.snapshot.encode():
        other = holder.decode("ascii", "replace").strip()
        raise NotPossibleNow(
            f"«{head.about.tag}» is snapshot {other if is_id(other) else 'another'} in {remote.url}: "
            f"tag this one otherwise (forky tag --force {head.snapshot} NEW_TAG) and push again"
        )


def _send(store: Store, remote: Remote, references: References, cache: Path, meter: Meter) -> tuple[int, int]:
    """How many chunks were sent, and bytes of packs."""
    pack, _ = RemoteIndex(remote, store.key, cache).find(store.hashes(references))
    missing = references[pack == ABSENT]
    parts = list(_split(store, missing))
    meter.begin("pushing", sum(size for _, size in parts))
    sent = 0
    for part, size in parts:
        parcel = Parcel(store, part)
        content = parcel.pack()
        remote.put(f"packs/{parcel.name}.pack", content)
        faults.reach("push-pack")
        remote.put(f"indexes/{parcel.name}.index", parcel.index())
        faults.reach("push-index")
        sent += len(content)
        meter.advance(size)
    return len(missing), sent


def _split(store: Store, references: References) -> Iterator[tuple[References, int]]:
    """Parts that make packs of about PACK_BYTES, with the bytes of their chunks."""
    lengths = np.empty(len(references), np.int64)
    numbers, positions = packs_of(references), positions_of(references)
    for number in np.unique(numbers).tolist():
        offsets = store.pack(number).index.offsets
        where = np.flatnonzero(numbers == number)
        lengths[where] = (offsets[positions[where] + 1] - offsets[positions[where]]).astype(np.int64)
    ends = np.cumsum(lengths)
    first = 0
    while first < len(references):
        before = int(ends[first - 1]) if first else 0
        after = max(first + 1, int(np.searchsorted(ends, before + PACK_BYTES, "right")))
        yield references[first:after], int(ends[after - 1]) - before
        first = after


def _send_image(images: ImageStore, remote: Remote, image: ImageId, meter: Meter) -> int:
    path = f"images/{image}.tar"
    if image in remote.list("images", ".tar"):
        return 0
    meter.begin("pushing the image", sum(entry.size_bytes for entry in images.manifest(image).files.values()))
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for piece in (*image_files.write(images, image, meter.advance), tape.END):
            sent += len(piece)
            yield piece

    remote.put(path, pieces())
    faults.reach("push-image")
    return sent
