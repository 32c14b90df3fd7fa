"""The principal of the call under way: set at the edge that authenticated them, read wherever it matters.

A context variable, so that an operation's own task (journal.carry) has its caller's.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace

from forkypig.errors import PermissionDenied
from forkypig.model import check_name
from forkypig.model.access import SYSTEM, Principal, Role

_current: ContextVar[Principal] = ContextVar("principal", default=SYSTEM)


def principal() -> Principal:
    """Who asks."""
    return _current.get()


def begin_acting(who: Principal) -> None:
    """From here on in this task, they ask."""
    _current.set(who)


@contextlib.contextmanager
def acting(who: Principal) -> Iterator[None]:
    """For as long as the block lasts, they ask."""
    token = _current.set(who)
    try:
        yield
    finally:
        _current.reset(token)


def in_tenant(who: Principal, tenant: str) -> Principal:
    """Who asks, in the tenant that the call names ("": their own). Raises PermissionDenied where that is not theirs,
    InvalidRequest for what no tenant can be called."""
    if not tenant or tenant == who.tenant:
        return who
    if not who.operator:
        raise PermissionDenied(f"you are of tenant «{who.tenant}» and of no other: leave out --tenant and FORKY_TENANT")
    return replace(who, tenant=check_name("tenant", tenant))


def for_tenant(tenant: str) -> Principal:
    """The system, at work on a tenant's things: what it does is that tenant's."""
    return Principal(SYSTEM.name, tenant, Role.ADMIN, operator=True)


def require_operator(what: str) -> None:
    """Raises PermissionDenied unless whoever asks runs this installation. `what` they wanted, as in «make tenants»."""
    if not principal().operator:
        raise PermissionDenied(f"only the operator of this installation may {what}: ask them")
