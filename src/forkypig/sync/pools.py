"""The blocking face of pools: what forkypig.sdk.pools has, without `await`."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from forkypig import errors, model
from forkypig.sdk import pools
from forkypig.sync.loop import Loop
from forkypig.sync.machine import Machine

_NO_LABELS: Mapping[str, str] = {}


class AcquiredMachine(Machine):
    """A machine of a pool; see forkypig.sdk.pools.AcquiredMachine. As a context manager it is released at the end."""

    def __init__(self, loop: Loop, inner: pools.AcquiredMachine, *, recycle: bool = False) -> None:
        super().__init__(loop, inner)
        self._acquired, self._recycle = inner, recycle

    @property
    def lease(self) -> model.Lease:
        return self._acquired.lease

    @property
    def waited_ms(self) -> float:
        return self._acquired.waited_ms

    @property
    def arrived_us(self) -> int:
        return self._acquired.arrived_us

    def release(self, *, recycle: bool = False) -> None:
        self._loop.run(self._acquired.release(recycle=recycle))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release(recycle=self._recycle)
        except errors.NotFound:
            return  # its lease has ended, or somebody removed it


class Pool:
    """The handle of one pool; see forkypig.sdk.pools.Pool."""

    def __init__(self, loop: Loop, inner: pools.Pool) -> None:
        self._loop, self._inner = loop, inner

    @property
    def name(self) -> str:
        return self._inner.name

    def acquire(
        self, *, ttl_s: float = 0.0, labels: Mapping[str, str] = _NO_LABELS, wait_s: float = 30.0, recycle: bool = False
    ) -> AcquiredMachine:
        async def acquiring() -> pools.AcquiredMachine:
            return await self._inner.acquire(ttl_s=ttl_s, labels=labels, wait_s=wait_s)

        return AcquiredMachine(self._loop, self._loop.run(acquiring()), recycle=recycle)

    def status(self) -> model.PoolStatus:
        return self._loop.run(self._inner.status())

    def scale(self, *, target: int | None = None, max: int | None = None) -> model.PoolStatus:
        return self._loop.run(self._inner.scale(target=target, max=max))

    def remove(self) -> None:
        self._loop.run(self._inner.remove())
