"""Templates: the first ready moment of an image in a shape, kept, so that later runs start from it in milliseconds.

One is made at a time for an image and shape, by whichever of several controllers: the operation that makes it is the
lease. Whoever comes meanwhile waits for that one. A template is carried to its
end also when the run that asked for it is left: the next one has use for it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, known_parent
from forkypig.controller.principal import principal
from forkypig.controller.store import events, images, intents, snapshots
from forkypig.core.intents import IntentKind, IntentStatus
from forkypig.errors import DeadlineExceeded, ForkyError
from forkypig.model import Image, Progress, Shape, Snapshot, SnapshotKind, new_snapshot_id
from forkypig.model.access import DEFAULT_TENANT
from forkypig.v1 import host_pb2

# A boot takes seconds, under TCG on a busy computer tens of them; a dead controller's is settled sooner.
_OTHERS_S = 300.0
_POLL_S = 0.2  # other controllers' ends are seen in the database alone

ShowProgress = Callable[[Progress], None]


class Templates:
    """Finds templates and makes them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._making: dict[snapshots.TemplateKey, asyncio.Future[Snapshot]] = {}

    async def get(
        self, image: Image, shape: Shape, host: host_pb2.HostStatus, show: ShowProgress = lambda _: None
    ) -> Snapshot:
        """The template that this host, as it is now, can load; made if there is none."""
        key = (image.id, shape)
        making = self._making.get(key)
        if making is None:
            async with self._desk.store.read() as tx:
                found = await snapshots.template(tx, image.id, shape)
            if found is not None and _fits(found, host):
                return found
            # Others may have begun it while we read.
            making = self._making.get(key)
        if making is None:
            making = self._desk.journal.begin(self._make(image, shape, host))
            self._making[key] = making
            making.add_done_callback(lambda _: self._making.pop(key, None))
        show(Progress("booting the template"))
        return await asyncio.shield(making)

    async def _make(self, image: Image, shape: Shape, host: host_pb2.HostStatus) -> Snapshot:
        desk = self._desk
        snapshot_id = new_snapshot_id()
        await desk.admission.refresh()
        desk.admission.admit(shape, 1, boots=True)
        with desk.journal.flight() as flight:
            while True:
                async with desk.store.write() as tx:
                    if not await self._others(tx, image, shape):
                        found = await snapshots.template(tx, image.id, shape)
                        if found is not None and _fits(found, host):
                            return found  # another controller has just made it
                        tenant = await self._owner(tx, image)
                        await snapshots.unset_template(tx, image.id, shape)  # one of another QEMU
                        of = {"image": image.id, **asdict(shape)}
                        intent = await intents.add(tx, IntentKind.TEMPLATE, snapshot=snapshot_id, tenant=tenant, **of)
                        flight.take(intent)
                        break
                await self._others_end(image, shape)
            try:
                made = await desk.host.make_template(snapshot_id, image.id, shape, tenant)
                async with desk.store.write() as tx:
                    made = replace(await known_parent(tx, made), tenant=tenant)
                    await snapshots.save(tx, [made])
                    await snapshots.set_template(tx, made)
                    await intents.end(tx, intent, IntentStatus.DONE)
                    words = f"template of {image.name}"
                    await events.add(tx, "snapshot.created", made.id, words, tenant=tenant)
            except ForkyError as error:
                await desk.undo(flight, error)
                raise
        desk.reconciler.collect.set()
        return made

    async def _others(self, tx: AsyncConnection, image: Image, shape: Shape) -> bool:
        """Whether another controller makes it, or what a dead one was at is not settled yet."""
        wanted = {"image": image.id, **asdict(shape)}
        open_ = await intents.unfinished(tx, kind=IntentKind.TEMPLATE.value)
        return any(wanted.items() <= intent.arguments.items() for intent in open_)

    async def _others_end(self, image: Image, shape: Shape) -> None:
        """Waits. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(_OTHERS_S):
                while True:
                    async with self._desk.store.read() as tx:
                        if not await self._others(tx, image, shape):
                            return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"another controller has been making the template of {image.name} for {_OTHERS_S:.0f} s: "
                "see its log, then try again"
            ) from error

    async def _owner(self, tx: AsyncConnection, image: Image) -> str:
        """Whose the template is. That of everybody's image holds nobody's data and is used by all tenants; to be
        listed and removed it is the default tenant's."""
        owners = await images.owned_by(tx, image.id)
        return principal().tenant if principal().tenant in owners else DEFAULT_TENANT

    async def drop(self, template: Snapshot) -> None:
        """It can't be used: it is an ordinary snapshot now, and the next `get` makes another."""
        async with self._desk.store.write() as tx:
            current = await snapshots.template(tx, template.image, template.shape)
            if current is not None and current.id == template.id:
                await snapshots.unset_template(tx, template.image, template.shape)
        self._desk.reconciler.look_soon(0.0)


def _fits(template: Snapshot, host: host_pb2.HostStatus) -> bool:
    """Device state can only be loaded by the QEMU build and under the accelerator that wrote it."""
    return (
        template.kind is SnapshotKind.TEMPLATE
        and template.qemu_build == host.qemu_build
        and template.accelerator == host.accelerator
    )
