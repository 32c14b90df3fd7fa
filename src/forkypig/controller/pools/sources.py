"""What a pool's machines begin as: a snapshot, or an image's first ready moment in some shape."""

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_snapshot
from forkypig.controller.forks import ground_of
from forkypig.controller.images import Images
from forkypig.controller.store import snapshots
from forkypig.core.config import bare
from forkypig.core.limits import check_disk_holds, check_shape, with_defaults
from forkypig.errors import InvalidRequest, NotFound
from forkypig.model import Image, MachineConfig, Pool, PoolId, Shape, Snapshot

_NO_SHAPE = Shape(0, 0, 0)


async def pool_of(desk: Desk, images: Images, source: str, shape: Shape) -> Pool:
    """A pool without its id, name and sizes. Raises InvalidRequest, NotFound."""
    try:
        image = await images.get(source)
    except NotFound:
        image = None
    async with desk.store.read() as tx:
        try:
            snapshot = await find_snapshot(tx, source)
        except NotFound:
            snapshot = None
        if snapshot is not None and image is None:
            return await _of_snapshot(tx, source, snapshot, shape)
    if image is None:
        raise NotFound("snapshot or image", source, "see forky snapshots and forky image ls")
    if snapshot is not None:
        raise InvalidRequest(f"«{source}» is an image ({image.id}) and a snapshot ({snapshot.id}): say which by its id")
    return _of_image(source, image, with_defaults(shape))


async def _of_snapshot(tx: AsyncConnection, source: str, snapshot: Snapshot, shape: Shape) -> Pool:
    if shape != _NO_SHAPE:
        raise InvalidRequest(
            "machines that start from a snapshot have its CPUs, memory and disk: leave out what says otherwise"
        )
    return Pool(
        id=PoolId(""),
        name="",
        source=source,
        from_image=False,
        image=snapshot.image,
        snapshot=snapshot.id,
        shape=snapshot.shape,
        config=bare((await ground_of(tx, snapshot)).config),
        target=0,
        max=1,
    )


def _of_image(source: str, image: Image, shape: Shape) -> Pool:
    check_shape(shape, 0)
    check_disk_holds(shape, image)
    return Pool(
        id=PoolId(""),
        name="",
        source=source,
        from_image=True,
        image=image.id,
        snapshot=None,
        shape=shape,
        config=MachineConfig(),
        target=0,
        max=1,
    )


async def check_still_there(tx: AsyncConnection, pool: Pool) -> None:
    """From here on the pool's snapshot can't be removed. Raises NotFound."""
    if pool.snapshot is not None and await snapshots.get(tx, pool.snapshot) is None:
        raise NotFound("snapshot", pool.snapshot, "it was removed just now; see forky snapshots")
