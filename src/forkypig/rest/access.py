"""/v1/tokens, whoami, audit: who may come in, and what they did."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forkypig.rest import bodies
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, STREAM, Sdk
from forkypig.rest.progress import event, streamed, wants_stream
from forkypig.rest.tenant_resources import AuditLine, Caller, MadeToken, Token
from forkypig.sdk.client import Forky

router = APIRouter(prefix="/v1", tags=["access"])
_MOST_LINES = 10_000


@router.get("/whoami")
async def get_caller(forky: Sdk) -> Caller:
    """Who the controller takes the caller for."""
    return Caller.of(await forky.whoami())


@router.get("/tokens")
async def list_tokens(forky: Sdk) -> list[Token]:
    """The tenant's tokens, the operator's all, oldest first, without their secrets. An admin's."""
    return [Token.of(each) for each in await forky.tokens()]


@router.post("/tokens", status_code=201)
async def create_token(forky: Sdk, body: bodies.CreateToken) -> MadeToken:
    """Makes a token, and tells it this once. It takes no idempotency key: its secret is kept nowhere. An admin's."""
    lifetime_s = 0 if body.lifetime_s is None else body.lifetime_s
    made, text = await forky.create_token(
        body.role, tenant=body.tenant or "", lifetime_s=lifetime_s, name=body.name or ""
    )
    return MadeToken(**Token.of(made).model_dump(), token=text)


@router.delete("/tokens/{token}", dependencies=CHANGES)
async def revoke_token(token: Reference, forky: Sdk) -> Token:
    """By id, or by a name that one token has; holds from the next call on. An admin's."""
    return Token.of(await forky.revoke_token(token))


@router.get("/audit", response_model=list[AuditLine], responses={200: {"content": STREAM}})
async def read_audit(
    request: Request,
    forky: Sdk,
    since_us: Annotated[int, Query(ge=0, le=(1 << 53) - 1, description="µs since the Unix epoch")] = 0,
    limit: Annotated[int, Query(ge=1, le=_MOST_LINES, description="the newest so many")] = 1000,
) -> Response:
    """What was done in the tenant, the operator's in all, oldest first. As text/event-stream: all of it since then, and
    what is being done from now on. An admin's."""
    if wants_stream(request):
        return streamed(_followed(forky, since_us))
    lines: list[AuditLine] = []
    async for entry in forky.audit(since_us=since_us):
        lines.append(AuditLine.of(entry))
        if len(lines) > 2 * _MOST_LINES:
            del lines[:-limit]
    return JSONResponse([line.model_dump(mode="json") for line in lines[-limit:]])


async def _followed(forky: Forky, since_us: int) -> AsyncGenerator[bytes, None]:
    async with aclosing(forky.audit(since_us=since_us, follow=True)) as entries:  # type: ignore[type-var]
        async for entry in entries:
            yield event("call", AuditLine.of(entry).model_dump(mode="json"))
