"""What goes to the wire comes back the same."""

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from forkypig import model
from forkypig.wire import convert

_counts = st.integers(min_value=1, max_value=2**31)
_shapes = st.builds(model.Shape, _counts, _counts, _counts)
_ids = st.one_of(st.none(), st.text("0123456789abcdef", min_size=1))
_machines = st.builds(
    model.Machine,
    id=st.text(min_size=1),
    name=st.text(),
    state=st.sampled_from(model.MachineState),
    image=st.text(),
    image_name=st.text(),
    shape=_shapes,
    snapshot=_ids,
    parent=_ids,
    qemu_pid=st.one_of(st.none(), _counts),
    address=_ids,
    failure=st.text(),
    accelerator=st.text(),
    accelerator_reason=st.text(),
    created_us=st.integers(0, 2**62),
    operation=st.text(),
    pool=st.one_of(st.none(), st.text(min_size=1).map(model.PoolId)),
)
_snapshots = st.builds(
    model.Snapshot,
    id=st.text(min_size=1),
    kind=st.sampled_from(model.SnapshotKind),
    tag=st.text(),
    parent=_ids,
    machine=_ids,
    image=st.text(),
    shape=_shapes,
    machine_type=st.text(),
    qemu_build=st.text(),
    accelerator=st.text(),
    cpu_model=st.text(),
    pause_ms=st.floats(0, 1e6),
    own_memory_bytes=st.integers(0, 2**60),
    packed=st.booleans(),
    created_us=st.integers(0, 2**62),
)


@given(_machines)
def test_machines(machine: model.Machine) -> None:
    assert convert.machine_from_wire(convert.machine_to_wire(machine)) == machine


@given(_snapshots)
def test_snapshots(snapshot: model.Snapshot) -> None:
    assert convert.snapshot_from_wire(convert.snapshot_to_wire(snapshot)) == snapshot


@given(_snapshots, st.lists(st.builds(model.Child, _machines, st.floats(0, 1e6)), max_size=3), _ids)
def test_fork_results(snapshot: model.Snapshot, children: list[model.Child], parent: str) -> None:
    result = model.ForkResult(snapshot=snapshot, parent=parent, pause_ms=1.5, children=tuple(children))
    assert convert.fork_result_from_wire(convert.fork_result_to_wire(result)) == result


def test_the_strategies_above_cover_every_field() -> None:
    """A field that is added to the model and forgotten on the wire must show."""
    assert {f.name for f in fields(model.Machine)} == {
        f.name for f in convert.machine_to_wire(_machine()).DESCRIPTOR.fields
    }
    assert {f.name for f in fields(model.Snapshot)} == {f.name for f in convert.pb.Snapshot.DESCRIPTOR.fields}


def _machine() -> model.Machine:
    return model.Machine(
        id=model.MachineId("m"), name="", state=model.MachineState.RUNNING, image=model.ImageId(""), shape=model.Shape()
    )
