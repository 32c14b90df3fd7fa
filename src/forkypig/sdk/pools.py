"""Pools of warm machines: making them, and acquiring machines of them.

async with forky.pool("py").acquire() as vm:
    await vm.exec(["python3", "-c", "print(6 * 7)"])
"""

from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from forkypig import errors, model
from forkypig.sdk.connection import MACHINE_S, QUICK_S, calls
from forkypig.sdk.machine import Machine
from forkypig.v1 import common_pb2, pools_pb2_grpc
from forkypig.v1 import pools_pb2 as pb
from forkypig.wire import convert
from forkypig.wire import pools as wire

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.v1.pools_pb2_grpc import PoolsAsyncStub

_NO_LABELS: Mapping[str, str] = {}
_MOST = (1 << 32) - 1


class Acquisition:
    """A machine that is about to be acquired: await it, or use it as an asynchronous context manager, at whose end the
    machine is released."""

    def __init__(
        self, pool: "Pool", ttl_s: float, labels: Mapping[str, str], wait_s: float, *, recycle: bool = False
    ) -> None:
        self._pool = pool
        self._request = pb.AcquireRequest(pool=pool.name, ttl_s=ttl_s, labels=labels, wait_s=wait_s)
        self._recycle = recycle
        self._machine: AcquiredMachine | None = None

    def __await__(self) -> Generator[Any, None, "AcquiredMachine"]:
        return self._acquire().__await__()

    async def _acquire(self) -> "AcquiredMachine":
        forky = self._pool.forky
        with calls(forky.socket):
            answer = await self._pool.stub.Acquire(self._request, timeout=self._request.wait_s + QUICK_S)
        lease, machine = wire.lease_from_wire(answer.lease), convert.machine_from_wire(answer.machine)
        self._machine = AcquiredMachine(forky, machine, lease, answer)
        return self._machine

    async def __aenter__(self) -> "AcquiredMachine":
        return await self._acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        machine, self._machine = self._machine, None
        if machine is not None:
            try:
                await machine.release(recycle=self._recycle)
            except errors.NotFound:
                return  # its lease has ended, or somebody removed it


class AcquiredMachine(Machine):
    """A machine of a pool, and the lease under which it is held."""

    def __init__(self, forky: "Forky", info: model.Machine, lease: model.Lease, answer: pb.AcquireResponse) -> None:
        super().__init__(forky, info)
        self.lease = lease
        self.waited_ms = answer.waited_ms  # in the queue
        self.arrived_us = answer.arrived_us  # when it took its place there, by the controller's clock

    async def release(self, *, recycle: bool = False) -> None:
        """Gives it back. See Pooling.release."""
        await self._forky.release(self.id, recycle=recycle)

    async def renew(self, ttl_s: float = 0.0) -> model.Lease:
        """Its lease begins anew. See Pooling.renew."""
        self.lease = await super().renew(ttl_s)
        return self.lease


class Pool:
    """The handle of one pool, by its name. Every verb raises NotFound when there is none."""

    def __init__(self, forky: "Forky", name: str) -> None:
        self.forky, self.name = forky, name

    def __repr__(self) -> str:
        return f"<Pool {self.name}>"

    @property
    def stub(self) -> "PoolsAsyncStub":
        return _stub(self.forky.channel)

    def acquire(
        self, *, ttl_s: float = 0.0, labels: Mapping[str, str] = _NO_LABELS, wait_s: float = 30.0, recycle: bool = False
    ) -> Acquisition:
        """A machine that runs, with an identity of its own: `await` it, or `async with` it.

        It is removed when it was not used (exec, files, terminals, `renew`) for `ttl_s` seconds (0: ten minutes).
        Where none is ready callers wait in turn, up to `wait_s`. `recycle`: at the end of the `async with` the pool
        gets another in its place at once.
        Raises ResourceExhausted when none was ready in time, InvalidRequest."""
        return Acquisition(self, ttl_s, labels, wait_s, recycle=recycle)

    async def status(self) -> model.PoolStatus:
        """What is in it: how many machines are ready, on their way, acquired; which; and the leases."""
        with calls(self.forky.socket):
            return wire.pool_from_wire(await self.stub.GetPool(pb.PoolRequest(pool=self.name), timeout=QUICK_S))

    async def scale(self, *, target: int | None = None, max: int | None = None) -> model.PoolStatus:
        """Other sizes; None: as it is. Raises InvalidRequest."""
        _check(target or 0, max or 0)
        request = pb.ScalePoolRequest(pool=self.name, target=target, max=max)
        with calls(self.forky.socket):
            return wire.pool_from_wire(await self.stub.ScalePool(request, timeout=QUICK_S))

    async def remove(self) -> None:
        """Removes it, and the machines that wait in it. Those that are acquired stay until their leases end."""
        with calls(self.forky.socket):
            await self.stub.RemovePool(pb.PoolRequest(pool=self.name), timeout=MACHINE_S)


class Pooling:
    """The part of Forky that is about pools."""

    @property
    def _forky(self) -> "Forky":
        return self  # type: ignore[return-value]  # it is a base of Forky alone

    def pool(self, name: str) -> Pool:
        """The handle of a pool; nothing is asked yet."""
        return Pool(self._forky, name)

    async def create_pool(
        self,
        name: str,
        source: str,
        *,
        target: int,
        max: int,
        cpus: int = 0,
        memory_mib: int = 0,
        disk_mib: int = 0,
    ) -> model.PoolStatus:
        """Makes a pool of machines that begin as a snapshot (id, beginning of an id, or tag), or as an image's first
        ready moment, in the shape that is given (zeros are defaults). It fills in the background.

        `target` machines stand ready when nobody asks for any, more when many are asked for; there are never more than
        `max`, with those that are acquired. Raises AlreadyExists, NotFound, InvalidRequest."""
        _check(target, max, cpus, memory_mib, disk_mib)
        shape = common_pb2.Shape(cpus=cpus, memory_mib=memory_mib, disk_mib=disk_mib)
        request = pb.CreatePoolRequest(name=name, source=source, shape=shape, target=target, max=max)
        with calls(self._forky.socket):
            return wire.pool_from_wire(await _stub(self._forky.channel).CreatePool(request, timeout=QUICK_S))

    async def pools(self, *, contents: bool = False) -> Sequence[model.PoolStatus]:
        """All pools, oldest first. `contents`: with their machines and leases."""
        request = pb.ListPoolsRequest(machines=contents)
        with calls(self._forky.socket):
            answer = await _stub(self._forky.channel).ListPools(request, timeout=QUICK_S)
        return [wire.pool_from_wire(message) for message in answer.pools]

    async def release(self, machine: str, *, recycle: bool = False) -> None:
        """Gives an acquired machine back: it is removed, and nothing of it is left for others. `recycle`: its pool has
        another in its place at once. Raises NotFound, NotPossibleNow (it has no lease)."""
        request = pb.ReleaseRequest(machine=machine, recycle=recycle)
        with calls(self._forky.socket):
            await _stub(self._forky.channel).Release(request, timeout=MACHINE_S)

    async def renew(self, machine: str, ttl_s: float = 0.0) -> model.Lease:
        """A machine's lease begins anew, with another time to live unless `ttl_s` is 0. Raises NotFound,
        NotPossibleNow (it has none), InvalidRequest."""
        request = pb.RenewRequest(machine=machine, ttl_s=ttl_s)
        with calls(self._forky.socket):
            return wire.lease_from_wire(await _stub(self._forky.channel).Renew(request, timeout=QUICK_S))


def _stub(channel: grpc.aio.Channel) -> "PoolsAsyncStub":
    return pools_pb2_grpc.PoolsStub(channel)


def _check(*numbers: int) -> None:
    for number in numbers:
        if not 0 <= number <= _MOST:
            raise errors.InvalidRequest(f"{number} is not possible here: use a number from 0 on")
