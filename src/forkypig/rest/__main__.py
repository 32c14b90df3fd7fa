"""`python -m forkypig.rest`: the REST API, in the foreground, until SIGTERM."""

import asyncio
import sys

from forkypig.daemon import logs
from forkypig.daemon.server import AlreadyRunning, PidFile, raise_open_files
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.rest.server import run


def main() -> int:
    """Exit codes: 0 after SIGTERM, 1 where it can't run, with one line that says why."""
    settings = Settings()
    logs.configure("rest", settings.log_level)
    try:
        settings.check()
        for directory in (settings.home, settings.run, settings.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = PidFile(settings.pid_file("rest"))
    except (OSError, ValueError) as error:
        print(f"the REST API can't start: {error}", file=sys.stderr)
        return 1
    except AlreadyRunning:
        print(f"the REST API of {settings.home} is running already: see {settings.pid_file('rest')}", file=sys.stderr)
        return 1
    try:
        raise_open_files()
        asyncio.run(run(settings))
    except ForkyError as error:
        print(f"the REST API can't start: {error}", file=sys.stderr)
        return 1
    finally:
        del lock  # held until here
    return 0


if __name__ == "__main__":
    sys.exit(main())
