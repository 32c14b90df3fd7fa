"""Errors -> gRPC status -> HTTP, by one table: application/problem+json as RFC 9457 has it.

`type` is "urn:forkypig:problem:" and the error's class in words: what a program looks at. `detail` is the sentence for
a person. The HTTP codes are those of google.rpc.Code's mapping, but for a wrong state, which HTTP calls a conflict.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import grpc
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forkypig import errors
from forkypig.wire import status as codes

MEDIA_TYPE = "application/problem+json"
_PREFIX = "urn:forkypig:problem:"

# Every error of ours has a gRPC status (wire.status), and so one of these.
STATUS: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNKNOWN: 502,  # QEMU died or refused: we are well, what is behind us is not
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TITLES = {
    401: "Unauthenticated",
    405: "Method not allowed",
    411: "Length required",
    413: "Content too large",
    415: "Unsupported media type",
}
_SENTENCES = {413: "the request's body is too large: /v1/machines/…/file and …/archive take bodies of any size"}


class Problem(JSONResponse):
    """A response of RFC 9457. JSON of ASCII alone, so that no text of a request can break it."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def status_of(error: errors.ForkyError) -> int:
    """The HTTP status of an error."""
    return STATUS[codes.STATUS[type(error)]]


def kind_of(error: errors.ForkyError) -> str:
    """The class in words: "not-found"."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()


def document(error: errors.ForkyError | str, status: int = 500, kind: str = "") -> dict[str, Any]:
    """The problem's members. `status` and `kind` are for what no class of ours says."""
    if isinstance(error, errors.ForkyError):
        status, kind = status_of(error), kind_of(error)
    title = kind.replace("-", " ").capitalize() or _TITLES.get(status, "Error")
    # What another program sent may hold half a character, which no JSON reader likes.
    detail = str(error).encode(errors="replace").decode()
    return {"type": _PREFIX + kind if kind else "about:blank", "title": title, "status": status, "detail": detail}


def problem(
    error: errors.ForkyError | str,
    *,
    status: int = 500,
    kind: str = "",
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, Any] | None = None,
) -> Problem:
    """The response. `members`: further ones of the problem."""
    made = {**document(error, status, kind), **(members or {})}
    sent = dict(headers or {})
    if isinstance(error, errors.TooManyRequests):
        # Whole seconds (RFC 9110, section 10.2.3). A quota or a full host says nothing of when it will be otherwise.
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return Problem(made, status_code=made["status"], headers=sent)


class OnlyProblems:
    """ASGI middleware, the outermost: errors that a library answers as text become problems too (a body's limit)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced: Problem | None = None

        async def sending(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                kind = dict(message["headers"]).get(b"content-type", b"")
                if kind.startswith(b"text/plain"):
                    status = message["status"]
                    replaced = problem(_SENTENCES.get(status, "the request was refused"), status=status)
            if replaced is None:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                await replaced(scope, receive, send)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)
