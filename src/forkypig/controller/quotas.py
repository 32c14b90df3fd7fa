"""Quotas in the transaction that writes an operation down: two that race for what is left can't both have it."""

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.principal import principal
from forkypig.controller.store import intents, tenants, usage
from forkypig.core.intents import IntentKind
from forkypig.core.lifecycle import Action
from forkypig.core.quotas import check_quota
from forkypig.daemon.server import now_us
from forkypig.errors import NotFound
from forkypig.model import MachineId
from forkypig.model.tenants import Usage

_MINUTE_US = 60_000_000
# They give a machine a QEMU that may have none.
STARTING = (Action.START, Action.WAKE, Action.RESTORE)


async def used_by(tx: AsyncConnection, tenant: str) -> Usage:
    """What a tenant has, and what it is about to have."""
    changing = await intents.unfinished(tx, tenant=tenant, kind=IntentKind.CHANGE.value)
    starts = {action.value for action in STARTING}
    starting: set[MachineId] = {
        intent.source for intent in changing if intent.source and intent.arguments.get("action") in starts
    }
    return await usage.of_tenant(
        tx,
        tenant,
        starting=starting,
        forks_since_us=now_us() - _MINUTE_US,
    )


async def admit(tx: AsyncConnection, added: Usage) -> None:
    """Raises ResourceExhausted where the asking tenant's quota does not leave room for `added`; NotFound where the
    tenant was removed meanwhile. Before what is asked for is written in the same transaction."""
    tenant = await tenants.lock(tx, principal().tenant)
    if tenant is None:
        raise NotFound("tenant", principal().tenant, "see forky tenant ls")
    if any(limit is not None for limit in tenant.quota.limits()):
        check_quota(tenant, await used_by(tx, tenant.name), added)
