"""Fetches a snapshot from an object store: only chunks that are not here, as ranges of packs."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from forkypig.archive import image_files, needed, tape
from forkypig.archive.head import MOST_BYTES, MOST_MANIFEST_BYTES, Head, decode_head
from forkypig.archive.importing import Arrived, check_image, check_same, keep
from forkypig.archive.intake import Intake
from forkypig.archive.pins import Pins
from forkypig.archive.remote import Remote
from forkypig.archive.remote_index import RemoteIndex
from forkypig.archive.reporting import Meter
from forkypig.chunks import faults
from forkypig.chunks.format import Hashes
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.pack_index import ABSENT
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, NotFound
from forkypig.images.store import ImageStore
from forkypig.model import SnapshotId, check_name
from forkypig.model.ids import is_id

_RUN_BYTES = 4 << 20  # of a pack in one range
_GAP_BYTES = 64 << 10  # rather read over than asked around
_FETCH_BYTES = 32 << 20  # asked for at once
_AT_ONCE = 8
_MOST_TAG = 100


def heads(remote: Remote) -> list[Head]:
    """All snapshots of a place, the oldest first."""
    names = [name for name in remote.list("snapshots", ".json") if is_id(name)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [head for head in pool.map(lambda name: _head(remote, SnapshotId(name)), names) if head is not None]
    return sorted(found, key=lambda head: (head.about.created_us, head.snapshot))


def _head(remote: Remote, snapshot: SnapshotId) -> Head | None:
    content = remote.get(f"snapshots/{snapshot}.json", MOST_BYTES)
    if content is None:
        return None
    head = decode_head(content)
    if head.snapshot != snapshot:
        raise Damaged(f"snapshots/{snapshot}.json in {remote.url} is that of {head.snapshot}")
    return head


def find(remote: Remote, name: str) -> Head:
    """By id or tag. Raises NotFound."""
    snapshot = name
    if not is_id(name):
        content = remote.get(f"tags/{check_name('snapshot', name)}", _MOST_TAG)
        snapshot = content.decode("ascii", "replace").strip() if content else ""
    head = _head(remote, SnapshotId(snapshot)) if is_id(snapshot) else None
    if head is None:
        raise NotFound("snapshot", name, f"forky pull {remote.url} lists what is there")
    return head


def pull(
    store: Store,
    images: ImageStore,
    pins: Pins,
    remote: Remote,
    name: str,
    *,
    known: Collection[str],
    cache: Path,
    meter: Meter,
) -> Arrived:
    """Raises NotFound, Damaged, NotPossibleNow (the image is nowhere), ResourceExhausted, and what `Remote` raises."""
    meter.begin("looking up what is there")
    head = find(remote, name)
    if head.snapshot in known:
        check_same(store, head)
        return Arrived(head, None)
    content = remote.get(f"manifests/{head.snapshot}.manifest", MOST_MANIFEST_BYTES)
    if content is None:
        raise Damaged(f"the manifest of {head.snapshot} is missing in {remote.url}")
    manifest = head.read_manifest(content, store.key)
    _image(images, remote, head, manifest, meter)
    index, intake = RemoteIndex(remote, store.key, cache), Intake(store, pins)
    for step, wanted in (("pulling the index", needed.roots), ("pulling", lambda m: needed.pages(store, m))):
        _fetch(store, pins, index, remote, wanted(manifest), intake, meter, step)
    keep(store, manifest, meter)
    return Arrived(head, manifest, intake.new_chunks, intake.new_bytes)


def _image(images: ImageStore, remote: Remote, head: Head, manifest: Manifest, meter: Meter) -> None:
    if check_image(images, head, manifest, "in the store"):
        return
    assert head.image is not None
    assert manifest.base is not None
    stream = remote.stream(f"images/{head.image}.tar")
    if stream is None:
        raise Damaged(f"image {head.image} is missing in {remote.url}")
    meter.begin("pulling the image")
    reader, forget = tape.Reader(stream), head.about.forget_files
    image_files.read(reader, images, head.image, head.image_sha256, manifest.base.sha256, forget, meter.advance)


def _fetch(
    store: Store,
    pins: Pins,
    index: RemoteIndex,
    remote: Remote,
    hashes: Hashes,
    intake: Intake,
    meter: Meter,
    step: str,
) -> None:
    pins.add(hashes)
    with store.locked():
        hashes = hashes[store.find(hashes) == 0]
    pack, position = index.find(hashes)
    missing = int(np.count_nonzero(pack == ABSENT))
    if missing:
        raise Damaged(f"{missing} chunks of the snapshot are missing in {remote.url}")
    numbers = np.unique(pack).tolist()
    total = sum(int(index.packs[n].stored_lengths()[position[pack == n]].sum()) for n in numbers)
    meter.begin(step, total)
    for number in numbers:
        one = index.packs[number]
        sizes = one.index.sizes
        for run, content in _runs(remote, one.name, one.index.offsets, np.sort(position[pack == number])):
            start = int(one.index.offsets[run[0]])
            for at in run:
                first, end = int(one.index.offsets[at]) - start, int(one.index.offsets[at + 1]) - start
                piece = one.opened(at, content[first:end])
                intake.add(one.index.hashes[at].tobytes(), piece, int(sizes[at]))
                meter.advance(end - first)
            faults.reach("pull-run")
    intake.flush()


def _runs(
    remote: Remote,
    name: str,
    offsets: "np.ndarray[tuple[int], np.dtype[np.uint64]]",
    positions: "np.ndarray[tuple[int], np.dtype[np.int64]]",
) -> Iterator[tuple[list[int], bytes]]:
    """The positions in runs that are near one another, each with the part of the pack that it covers."""
    runs: list[list[int]] = []
    for at in positions.tolist():
        near = runs and int(offsets[at]) - int(offsets[runs[-1][-1] + 1]) <= _GAP_BYTES
        if near and int(offsets[at + 1]) - int(offsets[runs[-1][0]]) <= _RUN_BYTES:
            runs[-1].append(at)
        else:
            runs.append([at])
    for first in range(0, len(runs), _FETCH_BYTES // _RUN_BYTES):
        group = runs[first : first + _FETCH_BYTES // _RUN_BYTES]
        starts = [int(offsets[run[0]]) for run in group]
        ends = [int(offsets[run[-1] + 1]) for run in group]
        yield from zip(group, remote.ranges(f"packs/{name}.pack", starts, ends), strict=True)
