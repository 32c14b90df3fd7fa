"""hostd, with a step of a fork that fails or kills it: the file FORKY_HOME/fault says «raise STEP» or «kill STEP».

The file is taken away when it strikes, so each fault strikes once.
"""

import os
import signal
import sys
from pathlib import Path

from forkypig.errors import MachineFailed
from forkypig.hostd import __main__ as hostd
from forkypig.hostd import faults

_FAULT = Path(os.environ["FORKY_HOME"]) / "fault"


def strike(step: str) -> None:
    """Called at each step."""
    try:
        action, wanted = _FAULT.read_text().split()
    except FileNotFoundError:
        return
    if wanted != step:
        return
    _FAULT.unlink()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise MachineFailed(f"injected at {step}")


if __name__ == "__main__":
    faults.listen(strike)
    sys.exit(hostd.main())
