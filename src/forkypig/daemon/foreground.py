"""What the daemons' `main` have in common: settings, log, directories, and one process of each in a home."""

import sys
from collections.abc import Callable

from forkypig import tracing
from forkypig.daemon import logs
from forkypig.daemon.server import AlreadyRunning, PidFile
from forkypig.daemon.settings import Settings, load
from forkypig.errors import ForkyError


def run_daemon(
    name: str, title: str, body: Callable[[Settings], int | None], read: Callable[[], Settings] = load
) -> int:
    """Runs `body` as the one daemon of this name in its home, with the settings that `read` gives;
    `title` is what a person calls it.

    The exit code: that of `body` (None: 0), or 1 where it can't run, with one line on stderr that says why."""
    try:
        settings = read()
        settings.check()
        logs.configure(name, settings.log_level)
        for directory in (settings.home, settings.run, settings.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if read is load:  # what takes over from a process that serves has to serve, whatever has become of the modes
            settings.check_private()
        lock = PidFile(settings.pid_file(name))
    except AlreadyRunning:
        print(f"{title} of {settings.home} is running already: see {settings.pid_file(name)}", file=sys.stderr)
        return 1
    except (ForkyError, OSError, ValueError) as error:
        print(f"{title} can't start: {error}", file=sys.stderr)
        return 1
    try:
        return body(settings) or 0
    except ForkyError as error:
        print(f"{title} can't start: {error}", file=sys.stderr)
        return 1
    finally:
        tracing.close()
        del lock  # held until here
