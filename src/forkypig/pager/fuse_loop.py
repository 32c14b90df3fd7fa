"""pyfuse3's loop on asyncio."""

import pyfuse3
import pyfuse3.asyncio

# Each read of a snapshot that is not bound holds a worker until it is: with pyfuse3's 99 the rest would stop.
_MAX_WORKERS = 1_000_000


async def run() -> None:
    """Answers FUSE requests until the file system is unmounted or `pyfuse3.terminate` is called."""
    await pyfuse3.main(min_tasks=1, max_tasks=_MAX_WORKERS)


def enable() -> None:
    """Before `pyfuse3.init`."""
    pyfuse3.asyncio.enable()
