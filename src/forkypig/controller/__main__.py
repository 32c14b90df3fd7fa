"""`python -m forkypig.controller`: the daemon, in the foreground, until SIGTERM."""

import asyncio
import sys


def main() -> int:
    import forkypig.daemon.lean  # noqa: F401
    from forkypig.controller.app import run
    from forkypig.daemon import traces
    from forkypig.daemon.foreground import run_daemon
    from forkypig.daemon.settings import Settings

    def begin(settings: Settings) -> None:
        traces.begin("forky-controller")
        asyncio.run(run(settings))

    return run_daemon("controller", "the controller", begin)


if __name__ == "__main__":
    sys.exit(main())
