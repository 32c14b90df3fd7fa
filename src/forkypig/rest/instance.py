"""/v1/status, doctor, events, images, health: what concerns the instance and no single machine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from forkypig import errors
from forkypig.rest import bodies, resources
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, STREAM, TEXT, Sdk
from forkypig.rest.progress import OnProgress, answered, event, streamed, wants_stream
from forkypig.sdk.client import Forky

router = APIRouter(prefix="/v1", tags=["instance"])
_MOST = (1 << 53) - 1
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
After = Annotated[int, Query(ge=0, le=_MOST, description="only what came after the event of this number")]
LastEvent = Annotated[
    str | None, Header(alias="Last-Event-ID", description="of a stream that broke off: it goes on from there")
]


@router.get("/health")
async def get_health() -> resources.Health:
    """That this process answers; it needs no token and asks nobody."""
    return resources.Health(status="ok")


@router.get("/status")
async def get_status(forky: Sdk) -> resources.Status:
    """What runs, on which accelerator and why."""
    return resources.Status.of(await forky.remote_status())


@router.get("/metrics", response_class=PlainTextResponse, responses={200: {"content": {"text/plain": TEXT}}})
async def get_metrics(forky: Sdk) -> Response:
    """All metrics, in Prometheus's text format. The operator's, and of tokens of the role metrics."""
    return PlainTextResponse(await forky.metrics(), media_type=_PROMETHEUS)


@router.get("/doctor")
async def examine(forky: Sdk) -> resources.Examination:
    """Every requirement, whether it holds, and how to mend it. May take seconds."""
    return resources.Examination.of(list(await forky.doctor()))


@router.get("/events", response_model=list[resources.Event], responses={200: {"content": STREAM}})
async def list_events(
    request: Request,
    forky: Sdk,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    last_event_id: LastEvent = None,
) -> Response:
    """What happened, oldest first. As text/event-stream: all of it from `after` on, and what happens from now on."""
    if last_event_id is not None:
        if not last_event_id.isascii() or not last_event_id.isdecimal() or int(last_event_id) > _MOST:
            raise errors.InvalidRequest("Last-Event-ID is not the number of an event: leave it out")
        after = max(after, int(last_event_id))
    if wants_stream(request):
        return streamed(_follow(forky, after))
    found = [each async for each in forky.events(after_sequence=after, limit=limit)]
    return JSONResponse([resources.Event.of(each).model_dump(mode="json") for each in found])


async def _follow(forky: Forky, after: int) -> AsyncGenerator[bytes, None]:
    """All events, for ever."""
    async with aclosing(forky.follow_events(after_sequence=after)) as events:  # type: ignore[type-var]
        async for each in events:
            yield event(each.kind, resources.Event.of(each).model_dump(mode="json"), each.sequence)


@router.get("/images")
async def list_images(forky: Sdk) -> list[resources.Image]:
    """All images, oldest first."""
    return [resources.Image.of(image) for image in await forky.images()]


@router.post(
    "/images",
    status_code=201,
    dependencies=CHANGES,
    response_model=resources.Image,
    responses={201: {"content": STREAM}, 200: {"description": "Progress, then the image", "content": STREAM}},
)
async def build_image(request: Request, forky: Sdk, body: bodies.BuildImage) -> Response:
    """Builds the default image, or gives the one that is there from the same recipe. Takes about a minute."""

    async def work(show: OnProgress) -> resources.Image:
        return resources.Image.of(await forky.build_image(body.name or "", rebuild=body.rebuild, on_progress=show))

    return await answered(request, work, status=201, location=lambda made: f"/v1/images/{made.id}")


@router.get("/images/{image}")
async def get_image(image: Reference, forky: Sdk) -> resources.Image:
    """One image, by id or name."""
    return resources.Image.of(await forky.get_image(image))


@router.patch("/images/{image}", dependencies=CHANGES)
async def update_image(image: Reference, forky: Sdk, body: bodies.UpdateImage) -> resources.Image:
    """Names the files that forks of its machines don't have."""
    return resources.Image.of(await forky.update_image(image, forget_files=body.forget_files))


@router.delete("/images/{image}", status_code=204, dependencies=CHANGES, response_class=Response)
async def remove_image(image: Reference, forky: Sdk) -> None:
    """Deletes it. Not possible while machines stand on it."""
    await forky.remove_image(image)
