"""PostgreSQL's errors in words."""

import asyncio
from typing import Any

import structlog
from sqlalchemy import exc

from forkypig.errors import (
    ForkyError,
    HostUnreachable,
    InternalError,
    InvalidRequest,
    NotPossibleNow,
    ResourceExhausted,
)

log = structlog.get_logger()


def in_words(where: str, error: Exception) -> ForkyError:
    """The error as ours; `where`: the address without its password."""
    cause: Any = getattr(error, "orig", None) or error
    state = str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")
    told = str(cause).partition(": ")[2].partition("\n")[0] if str(cause).startswith("<class") else str(cause)
    told = told or type(cause).__name__
    for begins, cls, words in _WORDS:
        if state and state.startswith(begins):
            return cls(words.format(where=where, told=told))
    if not state and (_is_connection_lost(error, cause) or isinstance(cause, OSError | TimeoutError)):
        return _gone(where, told)
    log.error("database error", database=where, state=state, exc_info=error)
    return InternalError(f"the controller's database {where} failed: {told}")


def _is_connection_lost(error: Exception, cause: Any) -> bool:
    return (
        isinstance(error, exc.TimeoutError | asyncio.TimeoutError)
        or bool(getattr(error, "connection_invalidated", False))
        or "connection" in str(cause).lower()
    )


_GONE = (
    "the controller's database {where} can't be reached ({told}): machines run on; see that PostgreSQL runs and that "
    "FORKY_DATABASE is right, then try again"
)


def _gone(where: str, told: str) -> HostUnreachable:
    return HostUnreachable(_GONE.format(where=where, told=told))


# By the beginning of the SQLSTATE, the first that fits (https://www.postgresql.org/docs/15/errcodes-appendix.html).
_WORDS: tuple[tuple[tuple[str, ...], type[ForkyError], str], ...] = (
    (("08", "57P"), HostUnreachable, _GONE),
    (
        ("53100", "58030"),
        ResourceExhausted,
        "the disk of the controller's database {where} is full ({told}): free space there and try again",
    ),
    (
        ("53300",),
        ResourceExhausted,
        "the controller's database {where} has no connection to spare ({told}): raise its max_connections",
    ),
    (("53",), ResourceExhausted, "the server of the controller's database {where} ran out of something: {told}"),
    (("28",), InvalidRequest, "the controller's database {where} refuses the login ({told}): correct FORKY_DATABASE"),
    (("3D000",), InvalidRequest, "there is no database {where} ({told}): create it, or correct FORKY_DATABASE"),
    (
        ("42501",),
        InvalidRequest,
        "the user of {where} may not do what the controller needs ({told}): make it the owner of the database",
    ),
    (
        ("25006",),
        NotPossibleNow,
        "{where} is a copy that can't be written ({told}): name the primary in FORKY_DATABASE",
    ),
    (
        ("55P03", "40", "25P03", "57014"),
        NotPossibleNow,
        "others have kept the controller's database {where} busy for too long ({told}): try again",
    ),
    (("22021",), InvalidRequest, "text with a NUL character can't be kept: leave it out"),
    (
        ("XX001", "XX002"),
        InternalError,
        "the controller's database {where} is damaged ({told}): its server's log says more",
    ),
)
