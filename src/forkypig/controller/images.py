"""Images: the host builds and keeps them; here they are found by name, mirrored, and guarded against removal."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress

from forkypig.controller.collector import Collector
from forkypig.controller.desk import Desk
from forkypig.controller.principal import principal, require_operator
from forkypig.controller.store import events, machines, pools, snapshots
from forkypig.controller.store import images as rows
from forkypig.core.genealogy import Standing
from forkypig.errors import HostUnreachable, InternalError, NotFound, NotPossibleNow
from forkypig.model import Image, Pool, Progress, Snapshot, SnapshotKind, check_name
from forkypig.model.ids import is_id

DEFAULT_IMAGE = "debian-12"
_HINT = "see forky image ls, or make one with forky image build"


class Images:
    """The image part of the API."""

    def __init__(self, desk: Desk, collector: Collector) -> None:
        self._desk, self._collector = desk, collector
        self._building = asyncio.Lock()

    async def every(self) -> list[Image]:
        """All images that the asking tenant sees; as last seen where the host is away."""
        with suppress(HostUnreachable):
            await self._mirror()
        async with self._desk.store.read() as tx:
            return await rows.seen_by(tx, principal().tenant)

    async def _mirror(self) -> None:
        there = await self._desk.host.images()
        async with self._desk.store.write() as tx:
            await rows.replace_all(tx, there)

    async def get(self, text: str) -> Image:
        """By id or name, of one name the newest. Raises NotFound."""
        if not is_id(text):
            check_name("image", text)
        async with self._desk.store.read() as tx:
            found = await rows.find(tx, text, principal().tenant)
        if found is None:
            await self._mirror()
            async with self._desk.store.read() as tx:
                found = await rows.find(tx, text, principal().tenant)
        if found is None:
            raise NotFound("image", text, _HINT)
        return found

    async def find_or_build(self, text: str, show: Callable[[Progress], None]) -> Image:
        """The image; the default one is built where it is missing."""
        name = text or DEFAULT_IMAGE
        try:
            return await self.get(name)
        except NotFound:
            if name != DEFAULT_IMAGE:
                raise
        async with self._building:  # the second of two finds what the first has built
            try:
                return await self.get(name)
            except NotFound:
                pass
            async with aclosing(self.build(name, rebuild=False)) as building:
                async for update in building:
                    if isinstance(update, Image):
                        return update
                    show(update)
        raise InternalError(f"building image «{name}» ended without an image: look at hostd's log")

    async def build(self, name: str, *, rebuild: bool) -> AsyncGenerator[Progress | Image, None]:
        """Progress, and the image at last. A caller that goes away ends the build."""
        name = check_name("image", name or DEFAULT_IMAGE)
        async with aclosing(self._desk.host.build_image(name, rebuild=rebuild)) as building:
            async for update in building:
                if isinstance(update, Image):
                    async with self._desk.store.write() as tx:
                        await rows.save(tx, update)
                        await events.add(tx, "image.created", update.id, update.name)
                yield update

    async def update(self, text: str, forget_files: Sequence[str]) -> Image:
        """Changes what forks of the image's machines forget."""
        image = await self.get(text)
        await self._check_own(image, "change")
        image = await self._desk.host.update_image(image.id, forget_files)
        async with self._desk.store.write() as tx:
            await rows.save(tx, image)
            await events.add(tx, "image.updated", image.id, image.name)
        return image

    async def remove(self, text: str) -> None:
        """Removes an image and its templates. Raises NotPossibleNow, naming them, while others are made of it."""
        await self._desk.journal.carry(self._remove(text))

    async def _remove(self, text: str) -> None:
        image, tenant = await self.get(text), principal().tenant
        async with self._desk.store.write() as tx:
            owners = await rows.owned_by(tx, image.id)
            if tenant in owners and len(owners) > 1:
                _check_no_pool(image, [pool for pool in await pools.every(tx) if pool.tenant == tenant])
                using = [m for m in await machines.of_tenant(tx, tenant) if m.image == image.id]
                if standing := Standing(tuple(using), ()):
                    raise NotPossibleNow(
                        f"image «{image.name}» is used by {standing.sentence(tenant)}: remove those first"
                    )
                await rows.disown(tx, image.id, tenant)
                return
        await self._check_own(image, "remove")
        await self._collector.collect()
        templates = await self._check_unused(image)
        for template in templates:
            await self._collector.remove(template.id)
        await self._desk.host.remove_image(image.id)
        async with self._desk.store.write() as tx:
            await rows.delete_one(tx, image.id)
            await events.add(tx, "image.removed", image.id, image.name)

    async def _check_own(self, image: Image, what: str) -> None:
        """Raises PermissionDenied where others use the image too, unless the operator asks."""
        async with self._desk.store.read() as tx:
            owners = await rows.owned_by(tx, image.id)
        if owners != {principal().tenant}:
            require_operator(f"{what} image «{image.name}», which other tenants use too")

    async def _check_unused(self, image: Image) -> list[Snapshot]:
        """Its templates, when nothing else uses it."""
        async with self._desk.store.read() as tx:
            _check_no_pool(image, await pools.every(tx))
            users = [m for m in await machines.every(tx) if m.image == image.id]
            made_of_it = [s for s in await snapshots.every(tx) if s.image == image.id]
        templates = [s for s in made_of_it if s.kind is SnapshotKind.TEMPLATE]
        others = [s for s in made_of_it if s.kind is not SnapshotKind.TEMPLATE]
        if using := Standing(tuple(users), tuple(others)):
            raise NotPossibleNow(
                f"image «{image.name}» is used by {using.sentence(principal().tenant)}: remove those first"
            )
        return templates


def _check_no_pool(image: Image, every: Iterable[Pool]) -> None:
    """Raises NotPossibleNow where one of these pools is of the image, also with no machine in it."""
    using = [pool for pool in every if pool.image == image.id]
    tenant = principal().tenant
    for pool in sorted(using, key=lambda pool: pool.tenant != tenant):
        called, of = (
            (f"pool «{pool.name}»", f" {pool.name}") if pool.tenant == tenant else ("another tenant's pool", "")
        )
        raise NotPossibleNow(f"image «{image.name}» is used by {called}: remove that first (forky pool rm{of})")
