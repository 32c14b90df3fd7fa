"""The REST API and the command line's --json say the same of a thing: a field that one has, the other has."""

from pathlib import Path

from forkypig import model
from forkypig.cli import documents
from forkypig.rest import resources
from forkypig.sdk.status import Check, Status, Verdict

_SHAPE = model.Shape()
_IMAGE = model.ImageId("i-0123456789ab")


def test_the_fields_are_those_of_the_documents() -> None:
    machine = model.Machine(
        id=model.MachineId("m-0123456789ab"), name="a", state=model.MachineState.RUNNING, image=_IMAGE, shape=_SHAPE
    )
    snapshot = model.Snapshot(
        id=model.SnapshotId("s-0123456789ab"),
        kind=model.SnapshotKind.KEPT,
        image=_IMAGE,
        shape=_SHAPE,
        machine_type="q35",
        qemu_build="7.2",
        accelerator="tcg",
        cpu_model="max",
    )
    image = model.Image(id=_IMAGE, name="a", size_bytes=1, kernel="6", sha256="")
    event = model.Event(sequence=1, time_us=1, kind="a.b", subject="m")
    status = Status(home=Path("/"))
    check = Check("a", Verdict.OK, "")
    assert set(documents.machine(machine)) == set(resources.Machine.of(machine).model_dump())
    assert set(documents.snapshot(snapshot)) == set(resources.Snapshot.of(snapshot).model_dump())
    assert set(documents.image(image)) == set(resources.Image.of(image).model_dump())
    assert set(documents.event(event)) == set(resources.Event.of(event).model_dump())
    assert set(documents.status(status)) == set(resources.Status.of(status).model_dump())
    assert set(documents.check(check)) == set(resources.Check.model_validate(documents.check(check)).model_dump())
