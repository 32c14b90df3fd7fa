"""Errors -> HTTP, by one table: application/problem+json as RFC 9457 has it.

`type` is "urn:forkypig:problem:" and the error's class in words: what a program looks at. `detail` is the sentence for
a person. The status codes are those of google.rpc.Code's mapping, but for a wrong state, which HTTP calls a conflict.
"""

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

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


class Problem(JSONResponse):
    """A response of RFC 9457. JSON of ASCII alone, so that no text of a request can break it."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        import json

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
