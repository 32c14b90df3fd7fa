"""Events as they happen. Each follower reads the database at its own pace: there is no queue that could overflow."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from forkypig.controller.store import Store, events
from forkypig.core.following import is_wanted, told
from forkypig.daemon.server import now_us
from forkypig.model import Event

# Events of other controllers on the same database are not announced to us.
_LOOK_EVERY_S = 1.0
_GAP_S = 0.1
# However often something is written, a follower asks no more often than this.
_BREATH_S = 0.02


async def follow(
    store: Store, tenant: str, after: int, *, since_us: int = 0, kinds: Sequence[str] = (), follow: bool = True
) -> AsyncGenerator[Event, None]:
    """A tenant's events after the number `after` and from the time `since_us` on, of these kinds; ends when there are
    no more, unless `follow`."""
    if since_us:
        async with store.read() as tx:
            after = max(after, await events.before(tx, since_us))
    while True:
        written = store.next_write()
        async with store.read() as tx:
            found = await events.every_after(tx, after)
        whose = {event.sequence: owner for event, owner in found}
        ready = told([event for event, _ in found], after, now_us())
        for event in ready:
            after = event.sequence
            if whose[event.sequence] == tenant and event.time_us >= since_us and is_wanted(event.kind, kinds):
                yield event
        if len(ready) < len(found):
            await asyncio.sleep(_GAP_S)
        elif not found:
            if not follow:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await written.wait()
                    await asyncio.sleep(_BREATH_S)
