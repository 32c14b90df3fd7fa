"""/v1/tenants, quota, ksm; sharing snapshots."""

from fastapi import APIRouter
from starlette.responses import Response

from forkypig.model.access import EVERY_TENANT
from forkypig.model.tenants import Quota
from forkypig.rest import bodies, resources
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, Sdk
from forkypig.rest.tenant_resources import Ksm, Tenant

router = APIRouter(prefix="/v1", tags=["tenants"])


@router.get("/tenants")
async def list_tenants(forky: Sdk) -> list[Tenant]:
    """All tenants, by name. The operator's."""
    return [Tenant.of(each) for each in await forky.tenants()]


@router.post("/tenants", status_code=201, dependencies=CHANGES)
async def create_tenant(forky: Sdk, body: bodies.CreateTenant) -> Tenant:
    """Makes a tenant. What is not limited here is limited by the host alone. The operator's."""
    quota = Quota(**body.quota.model_dump())
    return Tenant.of(await forky.create_tenant(body.name, quota=quota))


@router.get("/tenants/{tenant}")
async def get_tenant(tenant: Reference, forky: Sdk) -> Tenant:
    """A tenant's quota, and what it uses."""
    return Tenant.of(await forky.get_tenant(tenant))


@router.patch("/tenants/{tenant}", dependencies=CHANGES)
async def set_quota(tenant: Reference, forky: Sdk, body: bodies.SetQuota) -> Tenant:
    """Changes its quota: a number limits, null takes the limit away, what is not given stays. The operator's."""
    given = body.quota.model_dump(exclude_unset=True)
    unlimited = [name for name, limit in given.items() if limit is None]
    return Tenant.of(await forky.set_quota(tenant, Quota(**given), unlimited=unlimited))


@router.delete("/tenants/{tenant}", status_code=204, dependencies=CHANGES, response_class=Response)
async def remove_tenant(tenant: Reference, forky: Sdk) -> None:
    """Removes a tenant that has nothing any more. The operator's."""
    await forky.remove_tenant(tenant)


@router.get("/quota")
async def get_quota(forky: Sdk) -> Tenant:
    """The caller's own tenant: what it uses, and may use."""
    return Tenant.of(await forky.get_tenant())


@router.get("/ksm")
async def get_ksm(forky: Sdk) -> Ksm:
    """What kernel samepage merging saves on the host. The operator's."""
    return Ksm.of(await forky.ksm())


@router.put("/ksm", dependencies=CHANGES)
async def set_ksm(forky: Sdk, body: bodies.SetKsm) -> Ksm:
    """Turns it on or off for the machines of the caller's tenant. A side channel (CVE-2015-2877). The operator's."""
    return Ksm.of(await forky.set_ksm(on=body.on, across_tenants=body.across_tenants))


@router.post("/snapshots/{snapshot}/share", dependencies=CHANGES)
async def share_snapshot(snapshot: Reference, forky: Sdk, body: bodies.Share) -> resources.Snapshot:
    """Lets another tenant, or all, start machines from it: with all that is in it, memory and secrets too."""
    return resources.Snapshot.of(await forky.share(snapshot, body.tenant or EVERY_TENANT))


@router.post("/snapshots/{snapshot}/unshare", dependencies=CHANGES)
async def unshare_snapshot(snapshot: Reference, forky: Sdk, body: bodies.Share) -> resources.Snapshot:
    """Takes that back. Machines that were started from it stay."""
    return resources.Snapshot.of(await forky.unshare(snapshot, body.tenant or EVERY_TENANT))
