"""forkypig.v1.Store: snapshots that leave and arrive, and the store's upkeep. The host does it; here names are found,
and what arrives becomes a row with a tag."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_own_snapshot
from forkypig.controller.host import followed, host_errors
from forkypig.controller.principal import principal, require_operator
from forkypig.controller.quotas import admit
from forkypig.controller.store import events, images, snapshots
from forkypig.controller.streams import resumed
from forkypig.controller.tags import check_tag_is_free
from forkypig.errors import AlreadyExists, ForkyError, InvalidRequest, NotPossibleNow
from forkypig.model import ImageId, Snapshot, SnapshotId, check_name
from forkypig.model.tenants import Usage
from forkypig.v1 import store_pb2 as pb
from forkypig.v1 import store_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.edge import answered, streamed

_Context = grpc.aio.ServicerContext[Any, Any]


class StoreServicer(store_pb2_grpc.StoreServicer):
    """See store.proto."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def _find(self, text: str) -> Snapshot:
        async with self._desk.store.read() as tx:
            return await find_own_snapshot(tx, text)

    # No deadlines: transfers take as long as they take, and end when the caller goes away or a worker dies.

    @streamed
    async def ExportSnapshot(self, request: pb.ExportRequest, context: _Context) -> AsyncGenerator[pb.ExportPart, None]:
        asked = pb.ExportRequest(snapshot=(await self._find(request.snapshot)).id, with_image=request.with_image)
        async with aclosing(followed(self._desk.host.store.ExportSnapshot(asked))) as parts:
            async for part in parts:
                yield part

    @streamed
    async def PushSnapshot(self, request: pb.PushRequest, context: _Context) -> AsyncGenerator[pb.TransferUpdate, None]:
        _check_url(request.url)
        asked = pb.PushRequest(
            snapshot=(await self._find(request.snapshot)).id, url=request.url, environment=request.environment
        )
        async with aclosing(followed(self._desk.host.store.PushSnapshot(asked))) as updates:
            async for update in updates:
                yield update

    @streamed
    async def ImportSnapshot(
        self, requests: AsyncIterator[pb.ImportPart], context: _Context
    ) -> AsyncGenerator[pb.TransferUpdate, None]:
        first = await anext(requests, None)
        if first is None or not first.HasField("options"):
            raise InvalidRequest("an import begins with its options")
        await self._check_tag(first.options.tag)
        call = self._desk.host.store.ImportSnapshot(resumed(first, requests))
        async with aclosing(self._arriving(call, first.options.tag)) as updates:
            async for update in updates:
                yield update

    @streamed
    async def PullSnapshot(self, request: pb.PullRequest, context: _Context) -> AsyncGenerator[pb.TransferUpdate, None]:
        _check_url(request.url)
        await self._check_tag(request.tag)
        async with aclosing(self._arriving(self._desk.host.store.PullSnapshot(request), request.tag)) as updates:
            async for update in updates:
                yield update

    async def _arriving(self, call: Any, tag: str) -> AsyncGenerator[pb.TransferUpdate, None]:
        async with aclosing(followed(call)) as updates:
            before = {image.id for image in await self._desk.host.images()}
            async for update in updates:
                if update.HasField("result"):
                    # Carried to its end: the snapshot is on the host.
                    kept = await self._desk.journal.carry(self._keep(update.result, tag, before))
                    update.result.snapshot.CopyFrom(convert.snapshot_to_wire(kept))
                yield update

    async def _check_tag(self, tag: str) -> None:
        if tag:
            check_name("snapshot", tag)
            async with self._desk.store.read() as tx:
                await check_tag_is_free(tx, tag)

    async def _keep(self, result: pb.Transferred, tag: str, images_before: set[ImageId]) -> Snapshot:
        """The row of what has arrived; with the tag that was asked for, or else the one that it comes with, if that is
        free."""
        arrived = convert.snapshot_from_wire(result.snapshot)
        there, here = await self._desk.host.images(), await self._desk.host.snapshots()
        tenant = principal().tenant
        async with self._desk.store.write() as tx:
            # An image that was not here before is seen by the tenants whose imports brought it.
            if arrived.image not in images_before or await images.owned_by(tx, arrived.image):
                await images.own(tx, arrived.image, tenant)
            await images.replace_all(tx, there)
            row = await snapshots.get(tx, arrived.id)
            if row is not None and row.tenant != tenant:
                raise NotPossibleNow(
                    f"snapshot {arrived.id} can't be this tenant's: its id is in use on this installation; "
                    "have whoever owns it share it (forky share)"
                )
            if row is None or (tag and not row.tag):
                row = replace(row or arrived, tag=await self._free_tag(tx, tag, arrived.tag if row is None else ""))
                await admit(tx, Usage(snapshots=1, disk_mib=(row.own_disk_bytes + row.own_memory_bytes) >> 20))
                row = replace(row, tenant=tenant, parent=await self._own_parent(tx, row, tenant))
                await snapshots.save(tx, [row])
                await events.add(tx, "snapshot.arrived", row.id, row.tag)
                await self._link(tx, row, here)
            elif tag and row.tag != tag:
                raise AlreadyExists("tag of this snapshot", row.tag)
        await self._desk.host.label(row)
        return row

    async def _own_parent(self, tx: AsyncConnection, row: Snapshot, tenant: str) -> SnapshotId | None:
        """What arrives stands on nothing of another tenant's, whatever it says of itself."""
        parent = await snapshots.get(tx, row.parent) if row.parent else None
        return parent.id if parent is not None and parent.tenant == tenant else None

    async def _free_tag(self, tx: Any, asked: str, own: str) -> str:
        for tag in (asked, own):
            if not tag:
                continue
            try:
                await check_tag_is_free(tx, tag)
            except ForkyError:
                continue
            return tag
        return ""

    async def _link(self, tx: Any, arrived: Snapshot, here: Any) -> None:
        """What stands on it and came before it knows its parent now."""
        every = await snapshots.every(tx)
        children = [
            replace(row, parent=arrived.id)
            for row in every
            if row.parent is None
            and row.tenant == arrived.tenant
            and (seen := here.get(row.id)) is not None
            and seen.parent == arrived.id
        ]
        await snapshots.save(tx, children)

    @answered
    async def ListRemote(self, request: pb.ListRemoteRequest, context: _Context) -> pb.ListRemoteResponse:
        _check_url(request.url)
        with host_errors():
            answer: pb.ListRemoteResponse = await self._desk.host.store.ListRemote(request)
        return answer

    @streamed
    async def CollectStore(
        self, request: pb.CollectRequest, context: _Context
    ) -> AsyncGenerator[pb.CollectUpdate, None]:
        require_operator("collect the store's garbage")
        async with aclosing(followed(self._desk.host.store.CollectStore(request))) as updates:
            async for update in updates:
                yield update

    @streamed
    async def CheckStore(
        self, request: pb.CheckStoreRequest, context: _Context
    ) -> AsyncGenerator[pb.CheckStoreUpdate, None]:
        require_operator("check the store")
        async with aclosing(followed(self._desk.host.store.CheckStore(request))) as updates:
            async for update in updates:
                yield update


def _check_url(url: str) -> None:
    """The host's directories are not its tenants'."""
    if not url.startswith("s3:"):  # a parser may read more as «file:» than begins so
        require_operator("keep snapshots elsewhere than in object stores (s3://…)")
