"""A snapshot is loaded only where everything that it needs is the same, and else the reason is said."""

from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.errors import NotPossibleNow
from forkypig.hostd.needs import Here, check_loadable
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.model import ImageId, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.qemu import cpu
from forkypig.qemu.command import Hardware

_HARDWARE = Hardware("pc-q35-7.2", "tcg", "max", "tap")
_CPU = cpu.Cpu("Big 9000", ("avx", "sse"))
_HERE = Here("qemu-1", _HARDWARE, "because", "because", _CPU)
_RECORD = SnapshotRecord(
    snapshot=Snapshot(
        id=SnapshotId("s-1"),
        kind=SnapshotKind.KEPT,
        image=ImageId("i-1"),
        shape=Shape(),
        machine_type="pc-q35-7.2",
        qemu_build="qemu-1",
        accelerator="tcg",
        cpu_model="max",
    ),
    phase=SnapshotPhase.PACKED,
    hardware=_HARDWARE,
    process_id="q-1",
    address=0,
    disk=Path("/d"),
    devices=Path("/s"),
    memory=None,
)


def test_where_all_is_the_same_it_is_loaded() -> None:
    check_loadable(_RECORD, _HERE)
    check_loadable(replace(_RECORD, phase=SnapshotPhase.FROZEN), _HERE)
    check_loadable(replace(_RECORD, cpu="Big 9000", cpu_features=("sse",)), _HERE)


@pytest.mark.parametrize(
    ("record", "here", "reason"),
    [
        (replace(_RECORD, phase=SnapshotPhase.SPLITTING), _HERE, "being made"),
        (replace(_RECORD, phase=SnapshotPhase.LOST), _HERE, "lost"),
        (_RECORD, replace(_HERE, build_id="qemu-2"), "another build of QEMU"),
        (_RECORD, replace(_HERE, hardware=replace(_HARDWARE, accelerator="kvm")), "FORKY_ACCELERATOR=tcg"),
        (_RECORD, replace(_HERE, hardware=replace(_HARDWARE, machine_type="pc-q35-9.2")), "pc-q35-9.2"),
        (_RECORD, replace(_HERE, hardware=replace(_HARDWARE, cpu_model="host")), "«host»"),
        (_RECORD, replace(_HERE, hardware=replace(_HARDWARE, network="none")), "FORKY_NETWORK"),
        (replace(_RECORD, cpu="Some CPU"), _HERE, "another CPU .Some CPU; here is Big 9000"),
        (replace(_RECORD, cpu="Big 9000", cpu_features=("amx", "avx", "vaes")), _HERE, "has not .amx, vaes.,"),
    ],
)
def test_where_something_is_not_it_is_refused_with_the_reason(record: SnapshotRecord, here: Here, reason: str) -> None:
    with pytest.raises(NotPossibleNow, match=reason):
        check_loadable(record, here)


def test_a_cpu_is_its_name_and_its_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : Big 9000\nflags : sse avx\n\nprocessor : 1\nflags : none\n")
    assert cpu.seen_with("host", info) == _CPU
    assert cpu.seen_with("max", info) == ("", ())
