"""The principal of the call under way: set at the edge that authenticated them, read wherever it matters.

A context variable, so that an operation's own task (journal.carry) has its caller's.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from forkypig.model.access import SYSTEM, Principal

_current: ContextVar[Principal] = ContextVar("principal", default=SYSTEM)


def principal() -> Principal:
    """Who asks."""
    return _current.get()


@contextlib.contextmanager
def acting(who: Principal) -> Iterator[None]:
    """For as long as the block lasts, they ask."""
    token = _current.set(who)
    try:
        yield
    finally:
        _current.reset(token)


def become(who: Principal) -> None:
    """From here on they ask, to the end of this task: of a call, which has a task of its own. Unlike `acting` it can
    be used where the end comes in another task, as that of a stream that is left does."""
    _current.set(who)
