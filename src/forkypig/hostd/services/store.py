"""forkypig.v1.HostStore: transfers and the store's upkeep, for the controller."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from forkypig.errors import InvalidRequest
from forkypig.hostd.archive_worker import Data, Head, Result
from forkypig.hostd.transfer import Transfers
from forkypig.model import Progress, Snapshot, SnapshotId
from forkypig.model.ids import check_id
from forkypig.v1 import store_pb2 as pb
from forkypig.v1 import store_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.edge import answered, streamed

_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]
_Moved = Progress | tuple[Snapshot, Mapping[str, Any]]


class HostStoreServicer(store_pb2_grpc.HostStoreServicer):
    """See store.proto. A caller that goes away ends the transfer, which goes on where it was when it is asked for
    again."""

    def __init__(self, transfers: Transfers, here: Mapping[SnapshotId, object]) -> None:
        """`here`: the snapshots of this host."""
        self._transfers, self._here = transfers, here

    @streamed
    async def ExportSnapshot(self, request: pb.ExportRequest, context: _Context) -> AsyncGenerator[pb.ExportPart, None]:
        snapshot = SnapshotId(check_id(request.snapshot))
        async with aclosing(self._transfers.export(snapshot, with_image=request.with_image)) as saying:
            async for said in saying:
                if isinstance(said, Progress):
                    yield pb.ExportPart(progress=convert.progress_to_wire(said))
                elif isinstance(said, Head):
                    yield pb.ExportPart(head=said.content)
                elif isinstance(said, Data):
                    yield pb.ExportPart(data=said.content)

    @streamed
    async def ImportSnapshot(
        self, requests: AsyncIterator[pb.ImportPart], context: _Context
    ) -> AsyncGenerator[pb.TransferUpdate, None]:
        first = await anext(requests, None)
        if first is None or not first.HasField("options"):
            raise InvalidRequest("an import begins with its options")
        async with aclosing(self._transfers.import_(_data(requests), first.options.trusted)) as moving:
            async for moved in moving:
                yield _update(moved)

    @streamed
    async def PushSnapshot(self, request: pb.PushRequest, context: _Context) -> AsyncGenerator[pb.TransferUpdate, None]:
        snapshot = SnapshotId(check_id(request.snapshot))
        async with aclosing(self._transfers.push(snapshot, request.url, request.environment)) as moving:
            async for moved in moving:
                yield _update(moved)

    @streamed
    async def PullSnapshot(self, request: pb.PullRequest, context: _Context) -> AsyncGenerator[pb.TransferUpdate, None]:
        async with aclosing(self._transfers.pull(request.url, request.name, request.environment)) as moving:
            async for moved in moving:
                yield _update(moved)

    @answered
    async def ListRemote(self, request: pb.ListRemoteRequest, context: _Context) -> pb.ListRemoteResponse:
        found = await self._transfers.remote(request.url, request.environment)
        return pb.ListRemoteResponse(
            snapshots=[
                pb.RemoteSnapshot(
                    id=each["snapshot"],
                    tag=each["tag"],
                    message=each["message"],
                    created_us=each["created_us"],
                    own_memory_bytes=each["own_memory_bytes"],
                    own_disk_bytes=each["own_disk_bytes"],
                    is_here=each["snapshot"] in self._here,
                )
                for each in found
            ]
        )

    @streamed
    async def CollectStore(
        self, request: pb.CollectRequest, context: _Context
    ) -> AsyncGenerator[pb.CollectUpdate, None]:
        async with aclosing(self._transfers.collect(dry_run=request.dry_run)) as saying:
            async for said in saying:
                if isinstance(said, Progress):
                    yield pb.CollectUpdate(progress=convert.progress_to_wire(said))
                elif isinstance(said, Result):
                    yield pb.CollectUpdate(result=pb.Collected(**said.fields))

    @streamed
    async def CheckStore(
        self, request: pb.CheckStoreRequest, context: _Context
    ) -> AsyncGenerator[pb.CheckStoreUpdate, None]:
        async with aclosing(self._transfers.check(deep=request.deep)) as saying:
            async for said in saying:
                if isinstance(said, Progress):
                    yield pb.CheckStoreUpdate(progress=convert.progress_to_wire(said))
                elif isinstance(said, Result):
                    yield pb.CheckStoreUpdate(result=_checked(said))


def _checked(said: Result) -> pb.CheckedStore:
    fields = dict(said.fields)
    problems = [pb.StoreProblem(subject=subject, text=text) for subject, text in fields.pop("problems")]
    return pb.CheckedStore(**fields, problems=problems)


async def _data(requests: AsyncIterator[pb.ImportPart]) -> AsyncGenerator[bytes, None]:
    async for part in requests:
        yield part.data


def _update(moved: _Moved) -> pb.TransferUpdate:
    if isinstance(moved, Progress):
        return pb.TransferUpdate(progress=convert.progress_to_wire(moved))
    snapshot, done = moved
    return pb.TransferUpdate(
        result=pb.Transferred(
            snapshot=convert.snapshot_to_wire(snapshot),
            was_there=done.get("was_there", done.get("was_here", False)),
            chunks=done["chunks"],
            bytes=done["bytes"],
        )
    )
