"""`python -m forkypig.controller`: the daemon, in the foreground, until SIGTERM."""

import asyncio
import sys

from forkypig import tracing
from forkypig.controller.app import run
from forkypig.daemon import logs, traces
from forkypig.daemon.server import AlreadyRunning, PidFile
from forkypig.daemon.settings import load
from forkypig.errors import ForkyError, InvalidRequest


def main() -> int:
    """Exit codes: 0 after SIGTERM, 1 where it can't run, with one line that says why."""
    try:
        settings = load()
    except InvalidRequest as error:
        print(f"the controller can't start: {error}", file=sys.stderr)
        return 1
    logs.configure("controller", settings.log_level)
    try:
        settings.check()
        for directory in (settings.home, settings.run, settings.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = PidFile(settings.pid_file("controller"))
    except (OSError, ValueError) as error:
        print(f"the controller can't start: {error}", file=sys.stderr)
        return 1
    except AlreadyRunning:
        print(f"a controller of {settings.home} is running already: see `forky status`", file=sys.stderr)
        return 1
    try:
        traces.begin("forky-controller")
        asyncio.run(run(settings))
    except ForkyError as error:
        print(f"the controller can't start: {error}", file=sys.stderr)
        return 1
    finally:
        tracing.close()
        del lock  # held until here
    return 0


if __name__ == "__main__":
    sys.exit(main())
