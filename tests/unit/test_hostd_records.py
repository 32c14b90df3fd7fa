"""Records survive hostd: whole or not at all; and one operation at a time on a machine."""

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.errors import Busy, NotPossibleNow, ResourceExhausted
from forkypig.hostd.machine import LiveMachine
from forkypig.hostd.records import MachineRecord, SnapshotPhase, SnapshotRecord, machine_ledger, snapshot_ledger
from forkypig.model import (
    ImageId,
    Machine,
    MachineId,
    MachineState,
    Shape,
    Snapshot,
    SnapshotId,
    SnapshotKind,
)
from forkypig.qemu.command import Hardware

_HARDWARE = Hardware("pc-q35-7.2", "tcg", "max", "user")
_RECORD = MachineRecord(
    machine=Machine(
        id=MachineId("m-000000000001"),
        name="web",
        state=MachineState.RUNNING,
        image=ImageId("i-000000000001"),
        shape=Shape(),
        snapshot=SnapshotId("s-000000000001"),
    ),
    hardware=_HARDWARE,
    process_id="q-00000001",
    disk=Path("/d"),
    console=Path("/c"),
    memory=SnapshotId("s-000000000001"),
    generation_id=uuid.UUID(int=5),
)
_SNAPSHOT = SnapshotRecord(
    snapshot=Snapshot(
        id=SnapshotId("s-000000000001"),
        kind=SnapshotKind.FORK,
        image=ImageId("i-000000000001"),
        shape=Shape(),
        machine_type="pc-q35-7.2",
        qemu_build="b",
        accelerator="tcg",
        cpu_model="max",
    ),
    phase=SnapshotPhase.SPLITTING,
    hardware=_HARDWARE,
    process_id="q-00000001",
    address=1 << 46,
    disk=Path("/d"),
    devices=Path("/v"),
    memory=None,
    successor="q-00000002",
    successor_disk=Path("/e"),
)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    machines, snapshots = machine_ledger(tmp_path), snapshot_ledger(tmp_path)
    machines.save(_RECORD.machine.id, _RECORD)
    snapshots.save(_SNAPSHOT.snapshot.id, _SNAPSHOT)
    assert machine_ledger(tmp_path).load() == {_RECORD.machine.id: _RECORD}
    assert snapshot_ledger(tmp_path).load() == {_SNAPSHOT.snapshot.id: _SNAPSHOT}
    machines.delete(_RECORD.machine.id)
    machines.delete(_RECORD.machine.id)
    assert machines.load() == {}


def test_a_durable_record_is_there_when_it_is_put_and_not_before(tmp_path: Path) -> None:
    ledger, packed = snapshot_ledger(tmp_path), replace(_SNAPSHOT, phase=SnapshotPhase.PACKED)
    ledger.save(_SNAPSHOT.snapshot.id, _SNAPSHOT)
    prepared = ledger.prepare(_SNAPSHOT.snapshot.id, packed)
    ledger.prepare(_SNAPSHOT.snapshot.id, packed)  # by a hostd that died before it could put it
    assert ledger.load() == {_SNAPSHOT.snapshot.id: _SNAPSHOT}
    assert not prepared.exists(), "what was not put is taken away at the next start"
    ledger.put(_SNAPSHOT.snapshot.id, ledger.prepare(_SNAPSHOT.snapshot.id, packed))
    ledger.sync()
    assert ledger.load() == {_SNAPSHOT.snapshot.id: packed}
    assert packed.is_durable
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


def test_a_damaged_record_does_not_keep_the_others_down(tmp_path: Path) -> None:
    ledger = machine_ledger(tmp_path)
    ledger.save(_RECORD.machine.id, _RECORD)
    (tmp_path / "machines" / "m-000000000002.json").write_text('{"machine": ')
    assert ledger.load() == {_RECORD.machine.id: _RECORD}
    assert (tmp_path / "machines" / "m-000000000002.damaged").exists()


def _live(record: MachineRecord = _RECORD) -> LiveMachine:
    return LiveMachine(record, lambda _: None)


def test_a_second_operation_is_told_what_goes_on() -> None:
    live = _live()
    with live.operation("forking", MachineState.RUNNING):
        assert live.view().operation == "forking"
        with pytest.raises(Busy, match="busy: forking"), live.operation("pausing", MachineState.RUNNING):
            raise AssertionError("two at once")
    assert live.view().operation == ""


def test_an_operation_that_fails_frees_the_machine() -> None:
    live = _live()
    with pytest.raises(ResourceExhausted), live.operation("forking", MachineState.RUNNING):
        raise ResourceExhausted("full")
    with live.operation("forking", MachineState.RUNNING):
        assert live.view().operation == "forking"


def test_the_wrong_state_says_what_to_do() -> None:
    stopped = _live(replace(_RECORD, machine=replace(_RECORD.machine, state=MachineState.STOPPED)))
    with pytest.raises(NotPossibleNow, match="forky start web"), stopped.operation("forking", MachineState.RUNNING):
        raise AssertionError
    paused = _live(replace(_RECORD, machine=replace(_RECORD.machine, state=MachineState.PAUSED)))
    with pytest.raises(NotPossibleNow, match="forky resume web"):
        paused.agent()


def test_a_change_of_state_is_saved_with_its_reason() -> None:
    saved: list[MachineRecord] = []
    live = LiveMachine(_RECORD, lambda machine: saved.append(machine.record))
    live.update(MachineState.FAILED, failure="QEMU died")
    assert [(r.machine.state, r.machine.failure) for r in saved] == [(MachineState.FAILED, "QEMU died")]
