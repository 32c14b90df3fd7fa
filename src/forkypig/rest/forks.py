"""What forking a machine and forking a snapshot have in common."""

from forkypig import model
from forkypig.rest import bodies, resources
from forkypig.sdk.client import Forky


async def forked(forky: Forky, source: str, body: bodies.NewFork, change: model.ConfigChange) -> resources.Fork:
    """Makes the children that the body asks for; `source` is an id."""
    made = await forky.fork(
        source,
        body.count,
        name=body.name or "",
        paused=body.paused,
        quiesce=body.quiesce,
        forget=body.forget,
        config=change,
        ttl_s=body.ttl_s,
    )
    return resources.Fork.of(made)
