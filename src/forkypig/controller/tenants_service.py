"""forkypig.v1.Tenants: protobuf in, protobuf out. What is done is in tenants.py."""

# gRPC names a servicer's methods as the .proto does.

from typing import Any

import grpc

from forkypig.controller.tenants import Tenants
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import tenants_pb2 as pb
from forkypig.v1 import tenants_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.edge import answered
from forkypig.wire.tenants import quota_from_wire, tenant_to_wire

_Context = grpc.aio.ServicerContext[Any, Any]


class TenantsServicer(tenants_pb2_grpc.TenantsServicer):
    """See tenants.proto."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    @answered
    async def CreateTenant(self, request: pb.CreateTenantRequest, context: _Context) -> pb.Tenant:
        return tenant_to_wire(*await self._tenants.create(request.name, quota_from_wire(request.quota)))

    @answered
    async def ListTenants(self, request: common.Empty, context: _Context) -> pb.ListTenantsResponse:
        return pb.ListTenantsResponse(tenants=[tenant_to_wire(*each) for each in await self._tenants.every()])

    @answered
    async def SetQuota(self, request: pb.SetQuotaRequest, context: _Context) -> pb.Tenant:
        quota = quota_from_wire(request.quota)
        return tenant_to_wire(*await self._tenants.set_quota(request.tenant, quota, list(request.unlimited)))

    @answered
    async def RemoveTenant(self, request: pb.TenantRequest, context: _Context) -> common.Empty:
        await self._tenants.remove(request.tenant)
        return common.Empty()

    @answered
    async def GetTenant(self, request: pb.TenantRequest, context: _Context) -> pb.Tenant:
        return tenant_to_wire(*await self._tenants.get(request.tenant))

    @answered
    async def GetKsm(self, request: common.Empty, context: _Context) -> common.KsmStatus:
        return await self._tenants.ksm()

    @answered
    async def SetKsm(self, request: pb.SetKsmRequest, context: _Context) -> common.KsmStatus:
        return await self._tenants.set_ksm(on=request.on, across_tenants=request.across_tenants)

    @answered
    async def ShareSnapshot(self, request: pb.ShareRequest, context: _Context) -> common.Snapshot:
        return convert.snapshot_to_wire(await self._tenants.share(request.snapshot, request.tenant))

    @answered
    async def UnshareSnapshot(self, request: pb.ShareRequest, context: _Context) -> common.Snapshot:
        return convert.snapshot_to_wire(await self._tenants.unshare(request.snapshot, request.tenant))
