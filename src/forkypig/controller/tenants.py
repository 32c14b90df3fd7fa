"""Tenants: made, limited and removed by the operator; and snapshots that one shares with others."""

from collections.abc import Sequence
from dataclasses import fields, replace

from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, as_seen, find_own_snapshot
from forkypig.controller.principal import principal, require_operator
from forkypig.controller.quotas import used_by
from forkypig.controller.store import events, snapshots
from forkypig.controller.store import tenants as rows
from forkypig.daemon.server import now_us
from forkypig.errors import AlreadyExists, ForkyError, InvalidRequest, NotFound, NotPossibleNow
from forkypig.model import Snapshot, SnapshotKind, check_name
from forkypig.model.access import DEFAULT_TENANT, EVERY_TENANT
from forkypig.model.tenants import Quota, Tenant, Usage
from forkypig.v1 import common_pb2 as common

_MOST = 2**31 - 1  # of what the database's columns hold


class Tenants:
    """The Tenants service's operations."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def create(self, name: str, quota: Quota) -> tuple[Tenant, Usage]:
        """Raises AlreadyExists, InvalidRequest, PermissionDenied."""
        require_operator("make tenants")
        tenant = Tenant(name=check_name("tenant", name), created_us=now_us(), quota=_checked(quota))
        try:
            async with self._desk.store.write() as tx:
                await rows.add(tx, tenant)
        except exc.IntegrityError as error:
            raise AlreadyExists("tenant", name) from error
        return tenant, Usage()

    async def every(self) -> Sequence[tuple[Tenant, Usage]]:
        """All tenants, by name, with what they have."""
        require_operator("list tenants")
        async with self._desk.store.read() as tx:
            return [(tenant, await used_by(tx, tenant.name)) for tenant in await rows.every(tx)]

    async def get(self, name: str) -> tuple[Tenant, Usage]:
        """The asking tenant where nobody is named. Raises NotFound, PermissionDenied."""
        name = name or principal().tenant
        if name != principal().tenant:
            require_operator("look at other tenants")
        async with self._desk.store.read() as tx:
            return await _find(tx, name), await used_by(tx, name)

    async def set_quota(self, name: str, quota: Quota, unlimited: Sequence[str]) -> tuple[Tenant, Usage]:
        """Limits that are None stay as they are; those named in `unlimited` go. What a tenant has beyond a new limit
        stays its own. Raises NotFound, InvalidRequest, PermissionDenied."""
        require_operator("set quotas")
        known = {each.name for each in fields(Quota)}
        if unknown := sorted(set(unlimited) - known):
            raise InvalidRequest(f"there is no quota of «{unknown[0][:80]}»: there are {', '.join(sorted(known))}")
        given = {each.name: value for each in fields(quota) if (value := getattr(quota, each.name)) is not None}
        _checked(quota)
        async with self._desk.store.write() as tx:
            tenant = await _find(tx, name or principal().tenant)
            tenant = replace(tenant, quota=replace(tenant.quota, **given, **dict.fromkeys(unlimited)))
            await rows.save(tx, tenant)
            return tenant, await used_by(tx, tenant.name)

    async def remove(self, name: str) -> None:
        """Raises NotPossibleNow while anything is the tenant's, and for the default one; NotFound, PermissionDenied."""
        require_operator("remove tenants")
        async with self._desk.store.write() as tx:
            tenant = await _find(tx, name)
            if tenant.ksm:
                raise NotPossibleNow(f"KSM is on for tenant «{name}»: forky --tenant {name} ksm off first")
            if tenant.name == DEFAULT_TENANT:
                raise NotPossibleNow(f"tenant «{DEFAULT_TENANT}» stays: who names no tenant is in it")
            things = await rows.things(tx, name)
            if left := [f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in things.items() if n]:
                raise NotPossibleNow(
                    f"tenant «{name}» has {', '.join(left)}: remove them first (forky --tenant {name} rm --all)"
                )
            await rows.delete_one(tx, name)

    # -- KSM ---------------------------------------------------------------------------------------------------------

    async def ksm(self) -> common.KsmStatus:
        """What it saves. Raises PermissionDenied: the figures are the whole host's."""
        require_operator("look at KSM")
        return await self._desk.host.ksm()

    async def set_ksm(self, *, on: bool, across_tenants: bool) -> common.KsmStatus:
        """For the tenant that is acted in. Raises NotPossibleNow where pages would be merged with another tenant's,
        unless `across_tenants`; PermissionDenied."""
        require_operator("turn KSM on and off")
        await self._desk.reconciler.ensure_reachable()
        async with self._desk.store.write() as tx:
            tenant = await _find(tx, principal().tenant)
            wanted = {each.name for each in await rows.every(tx) if each.ksm} - {tenant.name}
            if on and wanted and not across_tenants:
                raise NotPossibleNow(
                    f"KSM is on for tenant «{min(wanted)}», and the kernel would merge their pages with those of "
                    f"«{tenant.name}»: each could then find out by timing what the other has in memory "
                    "(CVE-2015-2877); turn it off there first, or accept that with --across-tenants"
                )
            before = tenant
            await rows.save(tx, replace(tenant, ksm=on))
        try:
            return await self._desk.host.set_ksm(sorted(wanted | {tenant.name} if on else wanted))
        except ForkyError:
            async with self._desk.store.write() as tx:
                await rows.save(tx, replace(await _find(tx, tenant.name), ksm=before.ksm))
            raise

    # -- sharing -------------------------------------------------------------------------------------------------------

    async def share(self, snapshot: str, tenant: str) -> Snapshot:
        """From now on another tenant (EVERY_TENANT: all) may start machines from it and compare it, no more.

        Whether there is a tenant of that name is not told: it may not be the asking one's to know. Raises NotFound,
        PermissionDenied, NotPossibleNow for what does not stay."""
        async with self._desk.store.write() as tx:
            row = await self._sharable(tx, snapshot, tenant)
            if row.kind is not SnapshotKind.KEPT:
                raise NotPossibleNow(
                    f"snapshot {row.id} goes by itself when nothing stands on it: give it a tag first (forky tag)"
                )
            await snapshots.share(tx, row.id, tenant)
            await events.add(tx, "snapshot.shared", row.id, f"with {tenant}")
            return (await as_seen(tx, [row]))[0]

    async def unshare(self, snapshot: str, tenant: str) -> Snapshot:
        """Takes it back; machines that stand on it stay. Raises NotFound where it is not shared so."""
        async with self._desk.store.write() as tx:
            row = await self._sharable(tx, snapshot, tenant)
            if not await snapshots.unshare(tx, row.id, tenant):
                whom = "all tenants" if tenant == EVERY_TENANT else f"tenant «{tenant}»"
                raise NotPossibleNow(f"snapshot {row.id} is not shared with {whom}: see forky snapshots")
            await events.add(tx, "snapshot.unshared", row.id, f"with {tenant}")
            return (await as_seen(tx, [row]))[0]

    async def _sharable(self, tx: AsyncConnection, snapshot: str, tenant: str) -> Snapshot:
        if tenant != EVERY_TENANT:
            check_name("tenant", tenant)
        if tenant == principal().tenant:
            raise InvalidRequest(f"tenant «{tenant}» is your own: name another, or all of them with --all")
        return await find_own_snapshot(tx, snapshot)


async def _find(tx: AsyncConnection, name: str) -> Tenant:
    found = await rows.get(tx, check_name("tenant", name))
    if found is None:
        raise NotFound("tenant", name, "see forky tenant ls")
    return found


def _checked(quota: Quota) -> Quota:
    if any(limit is not None and limit > _MOST for limit in quota.limits()):
        raise InvalidRequest(f"a quota can be 0 to {_MOST}: leave it out for no limit")
    return quota
