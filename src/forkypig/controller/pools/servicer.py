"""The Pools service: protobuf in, protobuf out. What is done is in controller/pools/pools.py."""

from typing import Any

import grpc

from forkypig.controller.pools.acquiring import Wish
from forkypig.controller.pools.pools import Pools
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import pools_pb2 as pb
from forkypig.v1 import pools_pb2_grpc
from forkypig.wire import convert
from forkypig.wire import pools as wire
from forkypig.wire.edge import answered

Context = grpc.aio.ServicerContext[Any, Any]


class PoolServicer(pools_pb2_grpc.PoolsServicer):
    """forkypig.v1.Pools."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    @answered
    async def CreatePool(self, request: pb.CreatePoolRequest, context: Context) -> pb.Pool:
        shape = convert.shape_from_wire(request.shape)
        made = await self._pools.create(request.name, request.source, shape, request.target, request.max)
        return wire.pool_to_wire(made)

    @answered
    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        found = await self._pools.every(contents=request.machines)
        return pb.ListPoolsResponse(pools=[wire.pool_to_wire(each) for each in found])

    @answered
    async def GetPool(self, request: pb.PoolRequest, context: Context) -> pb.Pool:
        return wire.pool_to_wire(await self._pools.get(request.pool))

    @answered
    async def ScalePool(self, request: pb.ScalePoolRequest, context: Context) -> pb.Pool:
        target = request.target if request.HasField("target") else None
        most = request.max if request.HasField("max") else None
        return wire.pool_to_wire(await self._pools.scale(request.pool, target, most))

    @answered
    async def RemovePool(self, request: pb.PoolRequest, context: Context) -> common.Empty:
        await self._pools.remove(request.pool)
        return common.Empty()

    @answered
    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> pb.AcquireResponse:
        wish = Wish(
            ttl_s=request.ttl_s,
            labels=dict(request.labels),
            wait_s=request.wait_s,
            answer=lambda given: wire.acquired_to_wire(given).SerializeToString(),
        )
        return wire.acquired_to_wire(await self._pools.acquire(request.pool, wish))

    @answered
    async def Release(self, request: pb.ReleaseRequest, context: Context) -> common.Empty:
        await self._pools.release(request.machine, recycle=request.recycle)
        return common.Empty()

    @answered
    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.Lease:
        return wire.lease_to_wire(await self._pools.renew(request.machine, request.ttl_s))
