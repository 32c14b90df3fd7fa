"""`python -m forkypig.controller`: the daemon, in the foreground, until SIGTERM."""

import asyncio
import sys

from forkypig.controller.app import run
from forkypig.daemon import traces
from forkypig.daemon.foreground import run_daemon
from forkypig.daemon.settings import Settings


def _run(settings: Settings) -> None:
    traces.begin("forky-controller")
    asyncio.run(run(settings))


def main() -> int:
    return run_daemon("controller", "the controller", _run)


if __name__ == "__main__":
    sys.exit(main())
