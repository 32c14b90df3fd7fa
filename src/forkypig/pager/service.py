"""forkypig.v1.Pager: the catalogue, for hostd."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

from forkypig.daemon.server import daemon_message
from forkypig.model import SnapshotId
from forkypig.pager import cache
from forkypig.pager.catalogue import Catalogue
from forkypig.pager.latency import BOUNDS_S, Latency
from forkypig.pager.order import BaseImage, Disk, DiskLayer, Extent, PackOrder
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.served import FileKind
from forkypig.pager.snapshot import Snapshot, State
from forkypig.v1 import common_pb2, pager_pb2, pager_pb2_grpc
from forkypig.wire.convert import shape_from_wire
from forkypig.wire.edge import answered, streamed

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

_STATES = {
    State.RESERVED: pager_pb2.PagerSnapshot.STATE_RESERVED,
    State.FROZEN: pager_pb2.PagerSnapshot.STATE_FROZEN,
    State.PACKED: pager_pb2.PagerSnapshot.STATE_PACKED,
}


class PagerServicer(pager_pb2_grpc.PagerServicer):
    """See pager.proto."""

    def __init__(
        self, catalogue: Catalogue, reader: ReaderLink, mountpoint: Path, started_us: int, latency: Latency
    ) -> None:
        self._catalogue, self._reader, self._latency = catalogue, reader, latency
        self._mountpoint, self._started_us = mountpoint, started_us

    @answered
    async def GetPagerStatus(self, request: common_pb2.Empty, context: _Context) -> pager_pb2.PagerStatus:
        snapshots = list(self._catalogue.snapshots.values())
        touched = [file for snapshot in snapshots for file in snapshot.files.values() if file.touched]
        files = [self._mountpoint / file.snapshot / file.kind.value for file in touched]
        cached = await asyncio.to_thread(lambda: sum(map(cache.cached_bytes, files)))
        try:
            stored_bytes, chunks = await self._reader.size()
        except OSError:  # a damaged pack: `forky fsck` tells more, and the rest is worth knowing
            stored_bytes = chunks = 0
        return pager_pb2.PagerStatus(
            pager=daemon_message(self._started_us),
            mountpoint=str(self._mountpoint),
            snapshots=[_message(snapshot) for snapshot in snapshots],
            cached_bytes=cached,
            stored_bytes=stored_bytes,
            chunks=chunks,
        )

    @answered
    async def GetSnapshotMemory(
        self, request: pager_pb2.SnapshotMemoryRequest, context: _Context
    ) -> pager_pb2.PagerSnapshot:
        return _message(self._catalogue.get(request.snapshot))

    @answered
    async def GetFaults(self, request: common_pb2.Empty, context: _Context) -> pager_pb2.PagerFaults:
        found = common_pb2.Distribution(bounds_s=BOUNDS_S, counts=self._latency.counts, sum_s=self._latency.sum_s)
        return pager_pb2.PagerFaults(latency=found, bytes=self._latency.bytes)

    @answered
    async def Reserve(self, request: pager_pb2.ReserveRequest, context: _Context) -> pager_pb2.ReserveResponse:
        path = await self._catalogue.reserve(
            request.snapshot, request.size_bytes, request.parent, request.pid, request.address
        )
        return pager_pb2.ReserveResponse(
            path=str(path), pids=[os.getpid(), *([self._reader.pid] if self._reader.pid else [])]
        )

    @answered
    async def Bind(self, request: pager_pb2.BindRequest, context: _Context) -> common_pb2.Empty:
        self._catalogue.bind(request.snapshot)
        return common_pb2.Empty()

    @answered
    async def EndOfLoad(self, request: pager_pb2.SnapshotMemoryRequest, context: _Context) -> common_pb2.Empty:
        self._catalogue.end_of_load(request.snapshot)
        return common_pb2.Empty()

    @streamed
    async def Pack(self, request: pager_pb2.PackRequest, context: _Context) -> AsyncIterator[common_pb2.Progress]:
        packing = await self._catalogue.pack(request.snapshot, _order(request))
        async for done, total in packing.follow():
            yield common_pb2.Progress(step="packing", done=done, total=total)

    @answered
    async def Open(self, request: pager_pb2.OpenRequest, context: _Context) -> common_pb2.Empty:
        await self._catalogue.open(request.snapshot, request.size_bytes, request.parent, request.base)
        return common_pb2.Empty()

    @answered
    async def Move(self, request: pager_pb2.MoveRequest, context: _Context) -> common_pb2.Empty:
        await self._catalogue.move(Path(request.path))
        return common_pb2.Empty()

    @answered
    async def Forget(self, request: pager_pb2.SnapshotMemoryRequest, context: _Context) -> common_pb2.Empty:
        await self._catalogue.forget(request.snapshot)
        return common_pb2.Empty()


def _message(snapshot: Snapshot) -> pager_pb2.PagerSnapshot:
    """A snapshot in a table. One that is lost has no state on the wire: STATE_UNSPECIFIED."""
    return pager_pb2.PagerSnapshot(
        snapshot=snapshot.id,
        size_bytes=snapshot.size_bytes,
        parent=snapshot.parent_id,
        state=_STATES.get(snapshot.state, pager_pb2.PagerSnapshot.STATE_UNSPECIFIED),
        reads=snapshot.memory.reads,
        read_bytes=snapshot.memory.read_bytes,
        own_bytes=snapshot.own_bytes,
        disk_bytes=_size(snapshot, FileKind.DISK),
        devices_bytes=_size(snapshot, FileKind.DEVICES),
    )


def _size(snapshot: Snapshot, kind: FileKind) -> int:
    file = snapshot.files.get(kind)
    return file.size_bytes if file is not None else 0


def _order(request: pager_pb2.PackRequest) -> PackOrder:
    return PackOrder(
        devices=Path(request.devices) if request.devices else None,
        disk=_disk(request.disk) if request.HasField("disk") else None,
        qemu_build=request.qemu_build,
        machine_type=request.machine_type,
        cpu_model=request.cpu_model,
        accelerator=request.accelerator,
        shape=shape_from_wire(request.shape),
        created_us=request.created_us,
        cpu=request.cpu,
        cpu_features=tuple(request.cpu_features),
    )


def _disk(message: pager_pb2.PackDisk) -> Disk:
    layers = [
        DiskLayer(
            Path(layer.path),
            [
                Extent(extent.guest_offset, extent.length, None if extent.zero else extent.file_offset)
                for extent in layer.extents
            ],
        )
        for layer in message.layers
    ]
    base = BaseImage(message.base.id, Path(message.base.path), message.base.sha256)
    return Disk(size_bytes=message.size_bytes, layers=layers, below=SnapshotId(message.below) or None, base=base)
