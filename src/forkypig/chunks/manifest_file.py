"""The manifests of a store, as files.

A snapshot is durable from the moment at which its manifest has its name; everything that it names was made durable
before.
"""

from pathlib import Path

from forkypig.chunks import durable, faults
from forkypig.chunks.manifest import Manifest
from forkypig.chunks.manifest_coding import decode, encode
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, NotFound
from forkypig.model import SnapshotId
from forkypig.model.ids import check_id, is_id

SUFFIX = ".manifest"


def save(store: Store, manifest: Manifest) -> None:
    """Makes the snapshot durable; what it names has been committed, by a writer that is still open. Raises
    ResourceExhausted."""
    path = manifest_path(store, manifest.snapshot)
    durable.write_whole(path, encode(manifest, store.key), faults.reach, "manifest")


def manifest_path(store: Store, snapshot: SnapshotId) -> Path:
    """Where a snapshot's manifest is or would be. Raises InvalidRequest for what is not an id."""
    return store.directory / "manifests" / (check_id(snapshot) + SUFFIX)


def load(store: Store, snapshot: SnapshotId) -> Manifest:
    """Raises NotFound, Damaged, InvalidRequest for another key than the store's."""
    path = manifest_path(store, snapshot)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound("packed snapshot", snapshot) from error
    manifest = decode(content, store.key)
    if manifest.snapshot != snapshot:
        raise Damaged(f"the manifest of {snapshot} is that of {manifest.snapshot}")
    return manifest


def remove(store: Store, snapshot: SnapshotId) -> None:
    """The snapshot is no longer there; `collect` takes what only it needed. Idempotent."""
    path = manifest_path(store, snapshot)
    path.unlink(missing_ok=True)
    durable.sync_directory(path.parent)


def saved(store: Store) -> list[SnapshotId]:
    """The snapshots that have a manifest, sorted by id."""
    names = [path.name for path in (store.directory / "manifests").glob("*" + SUFFIX)]
    return sorted(SnapshotId(name.removesuffix(SUFFIX)) for name in names if is_id(name.removesuffix(SUFFIX)))
