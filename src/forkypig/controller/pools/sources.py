"""What a pool's machines begin as: a snapshot, or an image's first ready moment in some shape."""

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_snapshot
from forkypig.controller.forks import ground_of
from forkypig.controller.images import Images
from forkypig.controller.store import snapshots
from forkypig.core.config import bare
from forkypig.core.limits import check_disk_holds, check_shape, with_defaults
from forkypig.errors import InvalidRequest, NotFound
from forkypig.model import ImageId, MachineConfig, Pool, PoolId, Shape, SnapshotId

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
            if shape != _NO_SHAPE:
                raise InvalidRequest(
                    "machines that start from a snapshot have its CPUs, memory and disk: leave out what says otherwise"
                )
            config = bare((await ground_of(tx, snapshot)).config)
            return _pool(source, snapshot.image, snapshot.id, snapshot.shape, config)
    if image is None:
        raise NotFound("snapshot or image", source, "see forky snapshots and forky image ls")
    if snapshot is not None:
        raise InvalidRequest(f"«{source}» is an image ({image.id}) and a snapshot ({snapshot.id}): say which by its id")
    shape = with_defaults(shape)
    check_shape(shape, 0)
    check_disk_holds(shape, image)
    return _pool(source, image.id, None, shape, MachineConfig())


def _pool(source: str, image: ImageId, snapshot: SnapshotId | None, shape: Shape, config: MachineConfig) -> Pool:
    """`snapshot` None: from the image itself."""
    return Pool(
        id=PoolId(""),
        name="",
        source=source,
        from_image=snapshot is None,
        image=image,
        snapshot=snapshot,
        shape=shape,
        config=config,
        target=0,
        max=1,
    )


async def check_still_there(tx: AsyncConnection, pool: Pool) -> None:
    """From here on the pool's snapshot can't be removed. Raises NotFound."""
    if pool.snapshot is not None and await snapshots.get(tx, pool.snapshot) is None:
        raise NotFound("snapshot", pool.snapshot, "it was removed just now; see forky snapshots")
