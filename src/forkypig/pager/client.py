"""The pager from hostd's side: its calls with our types and our errors."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from forkypig import model
from forkypig.model import SnapshotId
from forkypig.pager.order import Disk, PackOrder
from forkypig.v1 import common_pb2, pager_pb2, pager_pb2_grpc
from forkypig.wire.convert import progress_from_wire, shape_to_wire
from forkypig.wire.status import rpc_errors, translated

# The pager answers within milliseconds; this is for one that was stopped or a host that thrashes.
_TIMEOUT_S = 30.0


class PagerClient:
    """A connection to the pager. Every call raises HostUnreachable when the pager is not there."""

    def __init__(self, socket: Path) -> None:
        # Of those who answer faults; known after `status`, `daemon` or `reserve`.
        self.pids: tuple[int, ...] = ()
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options)
        self._stub = pager_pb2_grpc.PagerStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self) -> pager_pb2.PagerStatus:
        """What it serves."""
        with rpc_errors():
            answer: pager_pb2.PagerStatus = await self._stub.GetPagerStatus(common_pb2.Empty(), timeout=_TIMEOUT_S)
        self.pids = (answer.pager.pid,)
        return answer

    async def own_bytes(self, snapshot: SnapshotId) -> int:
        """How much memory of a snapshot is not its parent's. Raises NotFound."""
        request = pager_pb2.SnapshotMemoryRequest(snapshot=snapshot)
        with rpc_errors():
            found: pager_pb2.PagerSnapshot = await self._stub.GetSnapshotMemory(request, timeout=_TIMEOUT_S)
        return found.own_bytes

    async def daemon(self) -> common_pb2.Daemon:
        """What the process says of itself."""
        return (await self.status()).pager

    async def faults(self) -> pager_pb2.PagerFaults:
        """How long reads of its files took."""
        with rpc_errors():
            return await self._stub.GetFaults(common_pb2.Empty(), timeout=_TIMEOUT_S)

    async def reserve(
        self, snapshot: SnapshotId, size_bytes: int, parent: SnapshotId | None, pid: int, address: int
    ) -> Path:
        """Offers the memory of `pid` at `address`, before it is frozen, as the file that is returned: it can be mapped,
        and reading waits for `bind`. The same again is fine. `parent` is what the machine stands on, None when it
        booted cold. Raises AlreadyExists, NotFound (the parent), NotPossibleNow (the process) or InvalidRequest.
        """
        request = pager_pb2.ReserveRequest(
            snapshot=snapshot, size_bytes=size_bytes, parent=parent or "", pid=pid, address=address
        )
        with rpc_errors():
            answer = await self._stub.Reserve(request, timeout=_TIMEOUT_S)
        self.pids = tuple(answer.pids)
        return Path(answer.path)

    async def bind(self, snapshot: SnapshotId) -> None:
        """The process is frozen: serve from it. The same again is fine. Raises NotFound, or NotPossibleNow (gone)."""
        with rpc_errors():
            await self._stub.Bind(pager_pb2.BindRequest(snapshot=snapshot), timeout=_TIMEOUT_S)

    async def end_of_load(self, snapshot: SnapshotId) -> None:
        """The machine that loaded the snapshot runs. Raises NotFound."""
        with rpc_errors():
            await self._stub.EndOfLoad(pager_pb2.SnapshotMemoryRequest(snapshot=snapshot), timeout=_TIMEOUT_S)

    async def pack(self, snapshot: SnapshotId, order: PackOrder) -> AsyncIterator[model.Progress]:
        """Makes a snapshot durable (see Pack in pager.proto); progress is in bytes. A packed one is fine. Raises
        ResourceExhausted (disk full; nothing has changed), NotFound or NotPossibleNow."""
        request = pager_pb2.PackRequest(
            snapshot=snapshot,
            devices=str(order.devices or ""),
            disk=_disk_to_wire(order.disk) if order.disk else None,
            qemu_build=order.qemu_build,
            machine_type=order.machine_type,
            cpu_model=order.cpu_model,
            accelerator=order.accelerator,
            shape=shape_to_wire(order.shape),
            created_us=order.created_us,
            cpu=order.cpu,
            cpu_features=order.cpu_features,
        )
        # No deadline: it depends on the disk. The pager ends it when it makes no progress.
        async for message in translated(aiter(self._stub.Pack(request))):
            yield progress_from_wire(message)

    async def open(
        self, snapshot: SnapshotId, size_bytes: int, parent: SnapshotId | None, base: Path | None = None
    ) -> None:
        """Checks that a packed snapshot is offered, and says where its base image's disk is. Raises NotFound,
        InvalidRequest or NotPossibleNow (it is lost)."""
        request = pager_pb2.OpenRequest(
            snapshot=snapshot, size_bytes=size_bytes, parent=parent or "", base=str(base or "")
        )
        with rpc_errors():
            await self._stub.Open(request, timeout=_TIMEOUT_S)

    async def move(self, tables: Path) -> None:
        """Chunks are elsewhere, as a file says (MoveRequest in pager.proto). Raises InvalidRequest when it can't be
        read."""
        with rpc_errors():
            await self._stub.Move(pager_pb2.MoveRequest(path=str(tables)))

    async def forget(self, snapshot: SnapshotId) -> None:
        """Forgets a snapshot; unknown ones are fine. Raises NotPossibleNow while others need its frozen process."""
        with rpc_errors():
            await self._stub.Forget(pager_pb2.SnapshotMemoryRequest(snapshot=snapshot), timeout=_TIMEOUT_S)


def _disk_to_wire(disk: Disk) -> pager_pb2.PackDisk:
    return pager_pb2.PackDisk(
        size_bytes=disk.size_bytes,
        layers=[
            pager_pb2.DiskLayer(
                path=str(layer.path),
                extents=[
                    pager_pb2.DiskExtent(
                        guest_offset=extent.guest_offset,
                        length=extent.length,
                        file_offset=extent.file_offset or 0,
                        zero=extent.file_offset is None,
                    )
                    for extent in layer.extents
                ],
            )
            for layer in disk.layers
        ],
        below=disk.below or "",
        base=pager_pb2.BaseImage(id=disk.base.id, path=str(disk.base.path), sha256=disk.base.sha256),
    )
