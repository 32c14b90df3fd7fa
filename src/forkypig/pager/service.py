"""forkypig.v1.Pager: the store, for hostd."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from forkypig.daemon.server import daemon_message
from forkypig.errors import NotPossibleNow
from forkypig.pager.snapshot import Snapshot, State
from forkypig.pager.store import Store
from forkypig.v1 import common_pb2, pager_pb2, pager_pb2_grpc
from forkypig.wire import status

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

_STATES = {
    State.RESERVED: pager_pb2.PagerSnapshot.STATE_RESERVED,
    State.FROZEN: pager_pb2.PagerSnapshot.STATE_FROZEN,
    State.SETTLED: pager_pb2.PagerSnapshot.STATE_SETTLED,
}


def _answers(
    method: Callable[["PagerServicer", _Request, _Context], Awaitable[_Answer]],
) -> Callable[["PagerServicer", _Request, _Context], Awaitable[_Answer]]:
    """The edge of a call: errors become its status."""

    @functools.wraps(method)
    async def call(self: "PagerServicer", request: _Request, context: _Context) -> _Answer:
        try:
            return await method(self, request, context)
        except Exception as error:  # the edge of an RPC
            await status.abort(context, error)

    return call


class PagerServicer(pager_pb2_grpc.PagerServicer):
    """See pager.proto."""

    def __init__(self, store: Store, mountpoint: Path, started_us: int) -> None:
        self._store, self._mountpoint, self._started_us = store, mountpoint, started_us

    @_answers
    async def GetPagerStatus(self, request: common_pb2.Empty, context: _Context) -> pager_pb2.PagerStatus:
        return pager_pb2.PagerStatus(
            pager=daemon_message(self._started_us),
            mountpoint=str(self._mountpoint),
            snapshots=[_message(snapshot) for snapshot in self._store.snapshots.values()],
        )

    @_answers
    async def Reserve(self, request: pager_pb2.ReserveRequest, context: _Context) -> pager_pb2.ReserveResponse:
        path = await self._store.reserve(
            request.snapshot, request.size_bytes, request.parent, request.pid, request.address
        )
        return pager_pb2.ReserveResponse(path=str(path))

    @_answers
    async def Bind(self, request: pager_pb2.BindRequest, context: _Context) -> common_pb2.Empty:
        self._store.bind(request.snapshot)
        return common_pb2.Empty()

    @_answers
    async def EndOfLoad(self, request: pager_pb2.SnapshotMemoryRequest, context: _Context) -> common_pb2.Empty:
        self._store.end_of_load(request.snapshot)
        return common_pb2.Empty()

    async def Settle(
        self, request: pager_pb2.SnapshotMemoryRequest, context: _Context
    ) -> AsyncIterator[common_pb2.Progress]:
        try:
            settling = await self._store.settle(request.snapshot)
            async for done, total in settling.follow():
                yield common_pb2.Progress(step="writing memory", done=done, total=total)
        except Exception as error:  # the edge of an RPC
            await status.abort(context, error)

    async def Pack(self, request: pager_pb2.PackRequest, context: _Context) -> AsyncIterator[common_pb2.Progress]:
        await status.abort(context, NotPossibleNow("this pager can't pack yet"))
        yield common_pb2.Progress()

    @_answers
    async def Open(self, request: pager_pb2.OpenRequest, context: _Context) -> common_pb2.Empty:
        self._store.open(request.snapshot, request.size_bytes, request.parent)
        return common_pb2.Empty()

    @_answers
    async def Forget(self, request: pager_pb2.SnapshotMemoryRequest, context: _Context) -> common_pb2.Empty:
        await self._store.forget(request.snapshot)
        return common_pb2.Empty()


def _message(snapshot: Snapshot) -> pager_pb2.PagerSnapshot:
    """A snapshot in a table. One that is lost has no state on the wire: STATE_UNSPECIFIED."""
    return pager_pb2.PagerSnapshot(
        snapshot=snapshot.id,
        size_bytes=snapshot.size_bytes,
        parent=snapshot.parent_id,
        state=_STATES.get(snapshot.state, pager_pb2.PagerSnapshot.STATE_UNSPECIFIED),
        reads=snapshot.reads,
        read_bytes=snapshot.read_bytes,
        own_bytes=snapshot.own_bytes,
    )
