"""/v1/snapshots and /v1/tags."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from forkypig.rest import bodies, resources
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, STREAM, Sdk
from forkypig.rest.forks import forked
from forkypig.rest.progress import OnProgress, answered

router = APIRouter(prefix="/v1", tags=["snapshots"])


@router.get("/snapshots")
async def list_snapshots(forky: Sdk) -> list[resources.Snapshot]:
    """All snapshots, oldest first."""
    return [resources.Snapshot.of(each) for each in await forky.snapshots()]


@router.get("/snapshots/{snapshot}")
async def get_snapshot(snapshot: Reference, forky: Sdk) -> resources.Snapshot:
    """One snapshot, by id, the beginning of one, or tag."""
    return resources.Snapshot.of(await forky.get_snapshot(snapshot))


@router.delete("/snapshots/{snapshot}", status_code=204, dependencies=CHANGES, response_class=Response)
async def remove_snapshot(snapshot: Reference, forky: Sdk) -> None:
    """Deletes it. Not possible while a machine or another snapshot stands on it."""
    await forky.remove_snapshot(snapshot)


@router.post("/snapshots/{snapshot}/fork", status_code=201, dependencies=CHANGES)
async def fork_snapshot(snapshot: Reference, forky: Sdk, body: bodies.NewFork) -> resources.Fork:
    """Makes children of it."""
    change = body.config.change()
    found = await forky.get_snapshot(snapshot)
    return await forked(forky, found.id, body, change)


@router.post(
    "/snapshots/{snapshot}/pack",
    dependencies=CHANGES,
    response_model=resources.Snapshot,
    responses={200: {"content": STREAM}},
)
async def pack_snapshot(request: Request, snapshot: Reference, forky: Sdk) -> Response:
    """Writes it to the store now and waits until it is durable."""

    async def work(show: OnProgress) -> resources.Snapshot:
        return resources.Snapshot.of(await forky.pack(snapshot, on_progress=show))

    return await answered(request, work)


@router.get("/snapshots/{snapshot}/history")
async def get_snapshot_history(snapshot: Reference, forky: Sdk) -> list[resources.Snapshot]:
    """It and what it stands on, newest first."""
    found = await forky.get_snapshot(snapshot)
    return [resources.Snapshot.of(each) for each in await forky.history(found.id)]


@router.put("/tags/{tag}", dependencies=CHANGES)
async def set_tag(tag: Reference, forky: Sdk, body: bodies.Tag) -> resources.Snapshot:
    """Gives a snapshot this tag; it then stays until it is removed."""
    return resources.Snapshot.of(await forky.tag(body.snapshot, tag, force=body.force))


@router.delete("/tags/{tag}", dependencies=CHANGES)
async def remove_tag(tag: Reference, forky: Sdk) -> resources.Snapshot:
    """Takes a tag away; its snapshot stays."""
    return resources.Snapshot.of(await forky.untag(tag))
