"""Calm: a fork's pause is not held up by slots that are made and removed meanwhile.

Whatever changes interfaces takes one lock of the kernel, the RTNL lock, which is the same for all namespaces. Removing
a bridge waits with it for all CPUs (rcu_barrier in br_multicast_dev_del): 17 ms each were measured, and 1.4 s in a row
when the kernel removed 40 namespaces by itself. The switch to another tap needs the lock, and so does the QEMU that
loads device state (TUNSETOFFLOAD). So work that changes interfaces is done in short steps, and none begins in a pause.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Calm:
    """Many pauses at a time, or many steps of work at a time; pauses go first."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._pauses = 0
        self._steps = 0

    @contextlib.asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        """In the block no step of work is under way. Entering waits for those that are: at most some 50 ms."""
        self._pauses += 1  # at once: no step begins from here on
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._steps == 0)
            yield
        finally:
            self._pauses -= 1
            await self._tell()

    @contextlib.asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """A step of work, which begins when there is no pause."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pauses == 0)
            self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
