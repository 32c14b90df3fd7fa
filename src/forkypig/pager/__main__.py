"""`python -m forkypig.pager [--after HOME LOG_LEVEL]`: mounts, and keeps a holder serving the mount until SIGTERM.

This process, the keeper, has the FUSE descriptor too and does nothing with it: as long as it is open the mount lives.
When the holder dies a new one goes on with it, and with the requests in the inbox; whoever faults meanwhile waits.
When the keeper dies its holder serves on and starts the next keeper, which finds it (succession.py), or systemd does
where it has started this one: only both at once are the end of the mount. Each hands over what the next one needs of
the settings: the home's file may be spoilt by then.
"""

if __name__ == "__main__":
    import forkypig.daemon.lean  # noqa: F401

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

import structlog

from forkypig.daemon.foreground import run_daemon
from forkypig.daemon.server import tell_systemd
from forkypig.daemon.settings import Settings, handed_over, load
from forkypig.pager import kept_key, mount, succession
from forkypig.pager.inbox import new_inbox
from forkypig.pager.succession import AFTER

log = structlog.get_logger()

# A holder that dies so often in so short a time can't serve: then requests had better fail than wait for ever.
_MOST_DEATHS, _WITHIN_S = 5, 20.0
_HOLDER_ENDS_S = 15  # it takes a second or two; `forky down` gives us 20


class Keeper:
    """Keeps a holder."""

    def __init__(self, fd: int, inbox: int, settings: Settings, found: succession.Found | None = None) -> None:
        """`found`: a holder that serves already."""
        self._fd, self._inbox, self._settings, self._found = fd, inbox, settings, found
        self._holder: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """For signals. A holder that hangs is killed: whoever ends us would leave it behind."""
        self._stopping = True
        self._signal(signal.SIGKILL if number == signal.SIGALRM else signal.SIGTERM)
        signal.alarm(_HOLDER_ENDS_S)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._holder is not None:
                self._holder.send_signal(number)
            elif self._found is not None:
                signal.pidfd_send_signal(self._found.pidfd, number)

    def run(self) -> int:
        """Returns the exit code when it is over."""
        deaths: list[float] = []
        taken_over = False
        while not self._stopping:
            if self._found is not None:
                code = self._wait_for_the_found(self._found)
            else:
                self._holder = self._start(taken_over=taken_over)
                if self._stopping:  # the signal came in between
                    self._holder.terminate()
                code = _end_of(self._holder)
            if code == 0 or self._stopping or (code == succession.CAN_NOT_BE and not taken_over):
                return code
            taken_over = True
            deaths = [when for when in deaths if time.monotonic() - when < _WITHIN_S] + [time.monotonic()]
            log.error("holder died", code=code, deaths=len(deaths))
            if len(deaths) >= _MOST_DEATHS:
                return 1
        return 0

    def _wait_for_the_found(self, found: succession.Found) -> int:
        """Waits for a holder that is not our child. What it ended with nobody tells us: in peace it takes the mount
        away."""
        succession.wait(found.pid, found.pidfd)
        os.close(found.pidfd)
        self._found = None
        return 0 if mount.device_of(self._settings.memory) is None else 1

    def _start(self, *, taken_over: bool) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-P", "-m", "forkypig.pager.holder", str(self._fd), str(self._inbox), str(os.getpid())]
        words += [str(self._settings.home), self._settings.log_level]
        words += ["--taken-over"] if taken_over else []
        words += ["--kept"] if _by_systemd() else []
        return subprocess.Popen(words, pass_fds=[self._fd, self._inbox, *kept_key.descriptors()])


def _end_of(holder: subprocess.Popen[bytes]) -> int:
    """Waits for our child; returns its exit code."""
    pidfd = os.pidfd_open(holder.pid)
    try:
        succession.wait(holder.pid, pidfd)
    finally:
        os.close(pidfd)
    code = holder.poll()
    return -signal.SIGKILL if code is None else code  # subprocess buries it when it starts another


def _by_systemd() -> bool:
    """Whether the service manager has started this very process, and so starts the next (systemd.exec(5), from 248 on).
    What else it sets is inherited by all that a service starts, a `forky up` too."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def prepare(settings: Settings) -> None:
    """Makes the directories. Raises OSError."""
    for directory in (settings.home, settings.run, settings.store):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount.detach(settings.memory)  # a crash leaves a mount whose every use is ENOTCONN
    settings.memory.mkdir(mode=0o700, exist_ok=True)


def _run(settings: Settings) -> int:
    if (found := succession.find(settings.run / "holder.json")) is not None:
        log.error("the keeper before has died, its holder serves", holder=found.pid)
        if found.key >= 0:
            kept_key.take(found.key)
        keeper = Keeper(found.fuse, found.inbox, settings, found)
        tell_systemd()
    else:
        kept_key.keep()
        prepare(settings)
        keeper = Keeper(mount.attach(settings.memory), new_inbox(), settings)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, keeper.stop)
    code = keeper.run()
    mount.detach(settings.memory)
    return code


def main() -> int:
    os.umask(0o077)
    read = partial(handed_over, Path(sys.argv[2]), sys.argv[3]) if sys.argv[1:2] == [AFTER] else load
    return run_daemon("pager", "the pager", _run, read)


if __name__ == "__main__":
    sys.exit(main())
