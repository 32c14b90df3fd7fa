"""Errors -> HTTP, by one table: application/problem+json as RFC 9457 has it.

`type` is "urn:forkypig:problem:" and the error's class in words: what a program looks at. `detail` is the sentence for
a person. The status codes are those of google.rpc.Code's mapping, but for a wrong state, which HTTP calls a conflict.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forkypig import errors

MEDIA_TYPE = "application/problem+json"
_PREFIX = "urn:forkypig:problem:"

STATUS: dict[type[errors.ForkyError], int] = {
    errors.InvalidRequest: 400,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.NotPossibleNow: 409,
    errors.Busy: 409,
    errors.ResourceExhausted: 429,
    errors.Damaged: 500,
    errors.GuestUnresponsive: 504,
    errors.MachineFailed: 502,
    errors.HostUnreachable: 503,
    errors.DeadlineExceeded: 504,
    errors.InternalError: 500,
    errors.ForkyError: 500,
}
_TITLES = {401: "Unauthenticated", 405: "Method not allowed", 411: "Length required", 413: "Content too large"}
_SENTENCES = {413: "the request's body is too large: /v1/machines/…/file and …/archive take bodies of any size"}


class Problem(JSONResponse):
    """A response of RFC 9457. JSON of ASCII alone, so that no text of a request can break it."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def status_of(error: errors.ForkyError) -> int:
    """The HTTP status: the class's own, or that of the nearest class above."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


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
    return Problem(made, status_code=made["status"], headers=dict(headers or {}))


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
