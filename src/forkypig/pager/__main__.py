"""`python -m forkypig.pager`: mounts, and keeps a holder serving the mount until SIGTERM.

This process, the keeper, has the FUSE descriptor too and does nothing with it: as long as it is open the mount lives.
When the holder dies a new one goes on with it; whoever faults meanwhile waits.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import structlog

from forkypig.daemon import logs
from forkypig.daemon.server import AlreadyRunning, PidFile
from forkypig.daemon.settings import Settings, load
from forkypig.errors import InvalidRequest
from forkypig.pager import mount

log = structlog.get_logger()

# A holder that dies so often in so short a time can't serve: then requests had better fail than wait for ever.
_MOST_DEATHS, _WITHIN_S = 5, 20.0


class Keeper:
    """Keeps a holder."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._holder: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """For signals."""
        self._stopping = True
        if self._holder is not None:
            with contextlib.suppress(ProcessLookupError):
                self._holder.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Returns the exit code when it is over."""
        deaths: list[float] = []
        while not self._stopping:
            self._holder = self._start(taken_over=bool(deaths))
            if self._stopping:  # the signal came in between
                self._holder.terminate()
            code = self._holder.wait()
            if code == 0 or self._stopping:
                return code
            deaths = [when for when in deaths if time.monotonic() - when < _WITHIN_S] + [time.monotonic()]
            log.error("holder died", code=code, deaths=len(deaths))
            if len(deaths) >= _MOST_DEATHS:
                return 1
        return 0

    def _start(self, *, taken_over: bool) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-P", "-m", "forkypig.pager.holder", str(self._fd)]
        return subprocess.Popen([*words, "--taken-over"] if taken_over else words, pass_fds=[self._fd])


def prepare(settings: Settings) -> None:
    """Makes the directories. Raises OSError."""
    for directory in (settings.home, settings.run, settings.store):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount.detach(settings.memory)  # a crash leaves a mount whose every use is ENOTCONN
    settings.memory.mkdir(mode=0o700, exist_ok=True)


def main() -> int:
    try:
        settings = load()
    except InvalidRequest as error:
        print(f"the pager can't start: {error}", file=sys.stderr)
        return 1
    settings.check()
    logs.configure("pager", settings.log_level)
    os.umask(0o077)
    settings.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock = PidFile(settings.pid_file("pager"))
    except AlreadyRunning:
        print(f"the pager runs already for {settings.home}", file=sys.stderr)
        return 1
    prepare(settings)
    keeper = Keeper(mount.attach(settings.memory))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.stop)
    code = keeper.run()
    mount.detach(settings.memory)
    del lock
    return code


if __name__ == "__main__":
    sys.exit(main())
