"""Children that are there for one question."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from forkypig.sdk.connection import LONG_S

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky
    from forkypig.sdk.machine import Fork, Machine


@contextlib.asynccontextmanager
async def borrowed(forky: "Forky", *sources: str, name: str) -> "AsyncIterator[list[Fork]]":
    """A fork with one child of each source; the children are removed whatever happens. When this process is killed
    their leases remove them: these are as long as the longest call for which the children may have to wait unused."""
    forks: list[Fork] = []
    try:
        for source in sources:
            made = await forky.fork(source, name=name, ttl_s=LONG_S)
            forks.append(made)  # at once: the next may fail
        yield forks
    finally:
        # In a task of its own: who is interrupted a second time does not leave children behind either.
        await asyncio.shield(asyncio.ensure_future(_remove([child for fork in forks for child in fork.children])))


async def _remove(children: "list[Machine]") -> None:
    await asyncio.gather(*(child.remove() for child in children))
