"""/v1/pools: machines that are ready, and taking them."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from forkypig.rest import bodies
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import CHANGES, Sdk
from forkypig.rest.pool_resources import Acquired, Lease, Pool
from forkypig.rest.presence import while_there

router = APIRouter(prefix="/v1", tags=["pools"])


@router.get("/pools")
async def list_pools(forky: Sdk) -> list[Pool]:
    """All pools, oldest first."""
    return [Pool.of(each) for each in await forky.pools()]


@router.post("/pools", status_code=201, dependencies=CHANGES)
async def create_pool(forky: Sdk, body: bodies.CreatePool) -> Pool:
    """Makes a pool; it fills in the background."""
    made = await forky.create_pool(
        body.name,
        body.source,
        target=body.target,
        max=max(1, 2 * body.target) if body.max is None else body.max,
        cpus=body.cpus,
        memory_mib=body.memory_mib,
        disk_mib=body.disk_mib,
    )
    return Pool.of(made)


@router.get("/pools/{pool}")
async def get_pool(pool: Reference, forky: Sdk) -> Pool:
    """One pool: its machines, and who has acquired which."""
    return Pool.of(await forky.pool(pool).status())


@router.patch("/pools/{pool}", dependencies=CHANGES)
async def scale_pool(pool: Reference, forky: Sdk, body: bodies.ScalePool) -> Pool:
    """Changes how many machines it has."""
    return Pool.of(await forky.pool(pool).scale(target=body.target, max=body.max))


@router.delete("/pools/{pool}", status_code=204, dependencies=CHANGES, response_class=Response)
async def remove_pool(pool: Reference, forky: Sdk) -> None:
    """Removes it and the machines that wait in it. Acquired ones stay until they are released."""
    await forky.pool(pool).remove()


@router.post("/pools/{pool}/acquire", status_code=201, dependencies=CHANGES)
async def acquire_machine(request: Request, pool: Reference, forky: Sdk, body: bodies.Acquire) -> Acquired:
    """Takes a machine out of it: it runs, and is the caller's until it is released or its lease ends."""

    async def acquired() -> Acquired:
        acquisition = forky.pool(pool).acquire(ttl_s=body.ttl_s, labels=body.labels, wait_s=body.wait_s)
        return Acquired.by(await acquisition)

    return await while_there(request, acquired())


@router.post("/machines/{machine}/release", status_code=204, dependencies=CHANGES, response_class=Response)
async def release_machine(machine: Reference, forky: Sdk, body: bodies.Release | None = None) -> None:
    """Gives an acquired machine back: it is removed, and nothing of it is left for others."""
    await forky.release(machine, recycle=body is not None and body.recycle)


@router.post("/machines/{machine}/renew", dependencies=CHANGES)
async def renew_lease(machine: Reference, forky: Sdk, body: bodies.Renew | None = None) -> Lease:
    """Lets a machine's lease begin anew, as every use of it does."""
    return Lease.of(await forky.renew(machine, body.ttl_s if body else 0.0))
