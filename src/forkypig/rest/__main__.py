"""`python -m forkypig.rest`: the REST API, in the foreground, until SIGTERM."""

import asyncio
import sys

from forkypig.daemon.foreground import run_daemon
from forkypig.daemon.server import raise_open_files
from forkypig.daemon.settings import Settings
from forkypig.rest.server import run


def _run(settings: Settings) -> None:
    raise_open_files()
    asyncio.run(run(settings))


def main() -> int:
    return run_daemon("rest", "the REST API", _run)


if __name__ == "__main__":
    sys.exit(main())
