"""`python -m forkypig.rest.worker KEEPER`: serves the REST API until SIGTERM, or until its keeper ends."""

if __name__ == "__main__":
    import forkypig.daemon.lean  # noqa: F401

import asyncio
import ctypes
import os
import signal
import sys

from forkypig.daemon import logs
from forkypig.daemon.server import raise_open_files
from forkypig.daemon.settings import load
from forkypig.errors import ForkyError
from forkypig.rest import CAN_NOT
from forkypig.rest.server import run

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before that was said
        return CAN_NOT
    os.umask(0o077)
    try:
        settings = load()
        logs.configure("rest", settings.log_level)
        raise_open_files()
        asyncio.run(run(settings))
    except ForkyError as error:
        print(f"the REST API can't start: {error}", file=sys.stderr)
        return CAN_NOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
