"""The request under way, where it can come again: a context variable, from the edge to where intents are written.

The intent is written in the transaction that makes the rows, and names the request: so after a crash at any moment it
is known whether a request that comes again has made something.
"""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from forkypig.core.intents import IntentKind


@dataclass(slots=True)
class Asked:
    """A request with an idempotency key."""

    request: str  # SHA-256 of caller, method and key, hex
    content_sha256: str  # of what is asked, hex
    kind: IntentKind | None  # of the intent that it begins; None: it begins none that could be told from others
    is_new: bool = False  # its key was made for it, says the caller: it never came before
    taken: bool = False
    is_kept: bool = False  # its answer is written down by whoever answers
    works: set[asyncio.Future[Any]] = field(default_factory=set)  # that go on for it


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


def begin(asked: Asked) -> None:
    """From here on this task, and those that it begins, work for this request."""
    _asked.set(asked)


def note_work(work: asyncio.Future[Any]) -> None:
    """What the request has begun, and what goes on also when its caller has left."""
    if (asked := _asked.get()) is not None:
        asked.works.add(work)
        work.add_done_callback(asked.works.discard)


def current() -> Asked | None:
    """The request that this task works for."""
    return _asked.get()


def take(kind: IntentKind) -> Asked | None:
    """The request that an intent of this kind belongs to: the first of its kind does, others are means to its end."""
    asked = _asked.get()
    if asked is None or asked.taken or asked.kind is not kind:
        return None
    asked.taken = True
    return asked


def give_back() -> None:
    """What was begun for the request has come to nothing, and its intent is ended as undone: another may take it."""
    if (asked := _asked.get()) is not None:
        asked.taken = asked.is_kept = asked.is_new = False
