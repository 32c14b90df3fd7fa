"""Tenants, quotas and shared snapshots: what `Forky` has of them, in a class of its own that it inherits from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from forkypig import model
from forkypig.model.access import EVERY_TENANT
from forkypig.model.ksm import KsmStatus
from forkypig.model.tenants import Quota, Tenant, Usage
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import MACHINE_S, QUICK_S, calls
from forkypig.v1 import common_pb2, tenants_pb2_grpc
from forkypig.v1 import tenants_pb2 as pb
from forkypig.wire import convert
from forkypig.wire.tenants import quota_to_wire, tenant_from_wire

if TYPE_CHECKING:
    from forkypig.v1.tenants_pb2_grpc import TenantsAsyncStub

_NO_CHANGE = Quota()


@dataclass(frozen=True, slots=True)
class TenantInfo:
    """A tenant, and what it has."""

    tenant: Tenant
    used: Usage


class Tenancy:
    """The part of `Forky` that is about tenants."""

    socket: Endpoint

    @property
    def channel(self) -> grpc.aio.Channel:
        """The open channel."""
        raise NotImplementedError

    @property
    def _tenants(self) -> "TenantsAsyncStub":
        return tenants_pb2_grpc.TenantsStub(self.channel)

    async def tenants(self) -> Sequence[TenantInfo]:
        """All tenants, by name. The operator's: raises PermissionDenied."""
        with calls(self.socket):
            answer = await self._tenants.ListTenants(common_pb2.Empty(), timeout=QUICK_S)
        return [_info(message) for message in answer.tenants]

    async def get_tenant(self, name: str = "") -> TenantInfo:
        """A tenant, one's own where nobody is named, and what it has. Raises NotFound, PermissionDenied."""
        with calls(self.socket):
            return _info(await self._tenants.GetTenant(pb.TenantRequest(tenant=name), timeout=QUICK_S))

    async def create_tenant(self, name: str, *, quota: Quota = _NO_CHANGE) -> TenantInfo:
        """Makes a tenant. Limits that are None limit nothing. Raises AlreadyExists, PermissionDenied."""
        request = pb.CreateTenantRequest(name=name, quota=quota_to_wire(quota))
        with calls(self.socket):
            return _info(await self._tenants.CreateTenant(request, timeout=QUICK_S))

    async def set_quota(self, name: str, quota: Quota = _NO_CHANGE, *, unlimited: Sequence[str] = ()) -> TenantInfo:
        """Changes a tenant's quota. Limits that are None stay as they are, those whose names are in `unlimited` go.
        What it has beyond a new limit stays its own. Raises NotFound, InvalidRequest, PermissionDenied."""
        request = pb.SetQuotaRequest(tenant=name, quota=quota_to_wire(quota), unlimited=unlimited)
        with calls(self.socket):
            return _info(await self._tenants.SetQuota(request, timeout=QUICK_S))

    async def remove_tenant(self, name: str) -> None:
        """Raises NotPossibleNow while anything is the tenant's; NotFound, PermissionDenied."""
        with calls(self.socket):
            await self._tenants.RemoveTenant(pb.TenantRequest(tenant=name), timeout=QUICK_S)

    async def ksm(self) -> KsmStatus:
        """What kernel samepage merging saves on the host. The operator's: raises PermissionDenied."""
        with calls(self.socket):
            return _ksm(await self._tenants.GetKsm(common_pb2.Empty(), timeout=QUICK_S))

    async def set_ksm(self, *, on: bool, across_tenants: bool = False) -> KsmStatus:
        """Turns it on or off for the machines of one's tenant. Raises NotPossibleNow while it is on for another tenant,
        unless `across_tenants`: equal pages of both are then merged, and each can find out by timing what the other has
        in memory (CVE-2015-2877). PermissionDenied."""
        request = pb.SetKsmRequest(on=on, across_tenants=across_tenants)
        with calls(self.socket):
            return _ksm(await self._tenants.SetKsm(request, timeout=MACHINE_S))

    async def share(self, snapshot: str, tenant: str = EVERY_TENANT) -> model.Snapshot:
        """Lets another tenant, or all of them, start machines from a snapshot and compare it; no more than that.

        Raises NotFound, NotPossibleNow (it does not stay), PermissionDenied (it is not one's own)."""
        return await self._share("ShareSnapshot", snapshot, tenant)

    async def unshare(self, snapshot: str, tenant: str = EVERY_TENANT) -> model.Snapshot:
        """Takes that back; machines that stand on it stay. Raises NotPossibleNow where it is not shared so."""
        return await self._share("UnshareSnapshot", snapshot, tenant)

    async def _share(self, method: str, snapshot: str, tenant: str) -> model.Snapshot:
        request = pb.ShareRequest(snapshot=snapshot, tenant=tenant)
        with calls(self.socket):
            return convert.snapshot_from_wire(await getattr(self._tenants, method)(request, timeout=MACHINE_S))


def _ksm(message: common_pb2.KsmStatus) -> KsmStatus:
    return KsmStatus(
        message.running, tuple(message.tenants), message.merged_bytes, message.profit_bytes, message.full_scans
    )


def _info(message: pb.Tenant) -> TenantInfo:
    return TenantInfo(*tenant_from_wire(message))
