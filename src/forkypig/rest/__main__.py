"""`python -m forkypig.rest`: keeps a process that serves the REST API, in the foreground, until SIGTERM.

What serves (worker.py) takes whatever the network sends; when it dies the next one serves a second later.
"""

if __name__ == "__main__":
    import forkypig.daemon.lean  # noqa: F401

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import structlog

from forkypig.daemon.foreground import run_daemon
from forkypig.daemon.settings import Settings
from forkypig.rest import CAN_NOT

log = structlog.get_logger()
# One that dies so often in so short a time can't serve.
_MOST_DEATHS, _WITHIN_S = 5, 60.0
_AGAIN_S = 0.5


class Keeper:
    """Keeps one worker."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """For signals."""
        self._stopping = True
        if self._worker is not None:
            self._worker.terminate()

    def run(self) -> int:
        """The exit code, when it is over."""
        deaths: list[float] = []
        while not self._stopping:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "forkypig.rest.worker", str(os.getpid())], stdin=subprocess.DEVNULL
            )
            if self._stopping:  # the signal came in between
                self._worker.terminate()
            code = self._worker.wait()
            if code in (0, CAN_NOT) or self._stopping:
                return 1 if code == CAN_NOT else 0
            deaths = [when for when in deaths if time.monotonic() - when < _WITHIN_S] + [time.monotonic()]
            log.error("the REST API died", code=code, deaths=len(deaths))
            if len(deaths) >= _MOST_DEATHS:
                return 1
            time.sleep(_AGAIN_S)
        return 0


def _run(_settings: Settings) -> int:
    keeper = Keeper()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.stop)
    return keeper.run()


def main() -> int:
    os.umask(0o077)
    return run_daemon("rest", "the REST API", _run)


if __name__ == "__main__":
    sys.exit(main())
