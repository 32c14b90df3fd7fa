"""What a disk consists of, from the records alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.daemon.home import Home
from forkypig.errors import NotPossibleNow
from forkypig.hostd.disk_chains import DiskChains
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.images.store import ImageFiles, ImageStore
from forkypig.model import ImageId, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.qemu.command import Hardware

_IMAGE = ImageId("i-000000000001")
_FILES = ImageFiles(Path("/images/disk.raw"), "raw", Path("/k"), Path("/i"), "")
_MOUNT = Path("/home/memory")


def _record(name: str, parent: str | None, phase: SnapshotPhase) -> SnapshotRecord:
    return SnapshotRecord(
        snapshot=Snapshot(
            id=SnapshotId(name),
            kind=SnapshotKind.FORK,
            parent=SnapshotId(parent) if parent else None,
            image=_IMAGE,
            shape=Shape(),
            machine_type="",
            qemu_build="",
            accelerator="tcg",
            cpu_model="max",
        ),
        phase=phase,
        hardware=Hardware("", "tcg", "max", "none"),
        process_id="",
        address=0,
        disk=Path(f"/disks/{name}.qcow2"),
        devices=Path("/v"),
        memory=None,
    )


@pytest.fixture
def snapshots() -> dict[SnapshotId, SnapshotRecord]:
    """The image ← s-1 ← s-2 ← s-3, none packed; s-1 is lost."""
    made = [
        _record("s-1", None, SnapshotPhase.LOST),
        _record("s-2", "s-1", SnapshotPhase.FROZEN),
        _record("s-3", "s-2", SnapshotPhase.SPLITTING),
    ]
    return {record.snapshot.id: record for record in made}


@pytest.fixture
def chains(snapshots: dict[SnapshotId, SnapshotRecord], monkeypatch: pytest.MonkeyPatch) -> DiskChains:
    monkeypatch.setattr(ImageStore, "files", lambda _self, _image: _FILES)
    return DiskChains(Home(Path("/home")), ImageStore(Path("/images")), snapshots)


def _names(chain: object) -> list[str]:
    assert isinstance(chain, list)
    return [f"{path}" for path, _ in chain]


def test_what_is_not_packed_is_a_chain_down_to_the_image(chains: DiskChains) -> None:
    assert chains.below(None, _IMAGE) == [(_FILES.disk, "raw")]
    below = chains.below(SnapshotId("s-3"), _IMAGE)
    assert _names(below) == ["/disks/s-3.qcow2", "/disks/s-2.qcow2", "/disks/s-1.qcow2", "/images/disk.raw"]
    assert [driver for _, driver in below] == ["qcow2", "qcow2", "qcow2", "raw"]


def test_the_nearest_packed_snapshot_ends_the_chain(
    chains: DiskChains, snapshots: dict[SnapshotId, SnapshotRecord]
) -> None:
    second = SnapshotId("s-2")
    snapshots[second] = replace(snapshots[second], phase=SnapshotPhase.PACKED)
    assert chains.below(second, _IMAGE) == [(_MOUNT / "s-2/disk", "raw")]
    assert _names(chains.below(SnapshotId("s-3"), _IMAGE)) == ["/disks/s-3.qcow2", "/home/memory/s-2/disk"]
    assert chains.is_packed(second)
    assert not chains.is_packed(SnapshotId("s-3"))


def test_a_layer_that_is_gone_is_said(chains: DiskChains, snapshots: dict[SnapshotId, SnapshotRecord]) -> None:
    del snapshots[SnapshotId("s-2")]
    with pytest.raises(NotPossibleNow, match="s-2 is gone"):
        chains.below(SnapshotId("s-3"), _IMAGE)


def test_files_that_are_being_opened_are_known(chains: DiskChains) -> None:
    chain = chains.below(SnapshotId("s-3"), _IMAGE)
    with chains.opening(chain), chains.opening(chain[:1]):
        assert chains.is_being_opened(Path("/disks/s-3.qcow2"))
        assert not chains.is_being_opened(Path("/disks/s-9.qcow2"))
    assert not chains.is_being_opened(Path("/disks/s-3.qcow2"))
