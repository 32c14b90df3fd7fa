"""/v1/machines: making them, and what can be done to them."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.requests import Request
from starlette.responses import Response

from forkypig.rest import bodies, resources
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, STREAM, Sdk
from forkypig.rest.forks import forked
from forkypig.rest.progress import OnProgress, answered
from forkypig.sdk.machine import Machine

router = APIRouter(prefix="/v1/machines", tags=["machines"])


@router.get("")
async def list_machines(forky: Sdk) -> list[resources.Machine]:
    """All machines, oldest first."""
    return [resources.Machine.of(machine.info) for machine in await forky.list()]


@router.post(
    "",
    status_code=201,
    dependencies=CHANGES,
    response_model=resources.MadeMachine,
    responses={201: {"content": STREAM}, 200: {"description": "Progress, then the machine", "content": STREAM}},
)
async def run_machine(request: Request, forky: Sdk, body: bodies.Run) -> Response:
    """Makes a machine and waits until it is ready."""
    change = body.config.change()

    async def work(show: OnProgress) -> resources.MadeMachine:
        made = await forky.run(
            body.image or "",
            name=body.name or "",
            cpus=body.cpus,
            memory_mib=body.memory_mib,
            disk_mib=body.disk_mib,
            cold_boot=body.cold_boot,
            snapshot=body.snapshot or "",
            config=change,
            ttl_s=body.ttl_s,
            on_progress=show,
        )
        return resources.MadeMachine(**_of(made).model_dump(), ready_ms=made.ready_ms)

    return await answered(request, work, status=201, location=lambda made: f"/v1/machines/{made.id}")


@router.get("/{machine}")
async def get_machine(machine: Reference, forky: Sdk) -> resources.Machine:
    """One machine, by id or name."""
    return _of(await forky.get(machine))


@router.patch("/{machine}", dependencies=CHANGES)
async def update_machine(machine: Reference, forky: Sdk, body: bodies.Config) -> resources.Machine:
    """Changes its network, ports or limits at once, also while it runs."""
    change = body.change()
    found = await forky.get(machine)
    await found.update(change)
    return _of(found)


@router.delete("/{machine}", status_code=204, dependencies=CHANGES, response_class=Response)
async def remove_machine(machine: Reference, forky: Sdk) -> None:
    """Ends it and deletes its disk. Snapshots taken of it stay."""
    await (await forky.get(machine)).remove()


@router.post("/{machine}/pause", dependencies=CHANGES)
async def pause_machine(machine: Reference, forky: Sdk) -> resources.Machine:
    """Stops its processors; memory stays."""
    found = await forky.get(machine)
    await found.pause()
    return _of(found)


@router.post("/{machine}/resume", dependencies=CHANGES)
async def resume_machine(machine: Reference, forky: Sdk) -> resources.Machine:
    """Lets a paused machine go on."""
    found = await forky.get(machine)
    await found.resume()
    return _of(found)


@router.post("/{machine}/stop", dependencies=CHANGES)
async def stop_machine(
    machine: Reference, forky: Sdk, body: Annotated[bodies.Stop | None, Body()] = None
) -> resources.Machine:
    """Shuts it down and keeps its disk."""
    found = await forky.get(machine)
    await found.stop(force=body is not None and body.force)
    return _of(found)


@router.post("/{machine}/start", dependencies=CHANGES)
async def start_machine(machine: Reference, forky: Sdk) -> resources.Machine:
    """Boots a stopped machine from its disk."""
    found = await forky.get(machine)
    await found.start()
    return _of(found)


@router.post("/{machine}/restore", dependencies=CHANGES)
async def restore_machine(machine: Reference, forky: Sdk, body: bodies.Restore) -> resources.Machine:
    """Goes back to a snapshot in place: its id, name, address, ports and config stay."""
    found = await forky.get(machine)
    await found.restore(body.snapshot, keep_tag=body.keep_tag or "")
    return _of(found)


@router.post(
    "/{machine}/hibernate",
    dependencies=CHANGES,
    response_model=resources.Machine,
    responses={200: {"content": STREAM}},
)
async def hibernate_machine(request: Request, machine: Reference, forky: Sdk) -> Response:
    """Writes its memory to disk and ends its QEMU."""
    found = await forky.get(machine)

    async def work(show: OnProgress) -> resources.Machine:
        await found.hibernate(on_progress=show)
        return _of(found)

    return await answered(request, work)


@router.post("/{machine}/wake", dependencies=CHANGES)
async def wake_machine(machine: Reference, forky: Sdk) -> resources.Machine:
    """Lets a hibernated machine go on."""
    found = await forky.get(machine)
    await found.wake()
    return _of(found)


@router.post("/{machine}/fork", status_code=201, dependencies=CHANGES)
async def fork_machine(machine: Reference, forky: Sdk, body: bodies.NewFork) -> resources.Fork:
    """Splits it into itself and children that share its memory and disk copy-on-write."""
    change = body.config.change()
    found = await forky.get(machine)
    return await forked(forky, found.id, body, change)


@router.post("/{machine}/snapshots", status_code=201, dependencies=CHANGES)
async def take_snapshot(machine: Reference, forky: Sdk, body: bodies.TakeSnapshot) -> resources.Snapshot:
    """Keeps its state of this instant until it is removed."""
    found = await forky.get(machine)
    taken = await found.snapshot(body.tag or "", message=body.message, quiesce=body.quiesce)
    return resources.Snapshot.of(taken)


@router.get("/{machine}/history")
async def get_machine_history(machine: Reference, forky: Sdk) -> list[resources.Snapshot]:
    """What it stands on, newest first."""
    found = await forky.get(machine)
    return [resources.Snapshot.of(each) for each in await forky.history(found.id)]


def _of(machine: Machine) -> resources.Machine:
    return resources.Machine.of(machine.info)
