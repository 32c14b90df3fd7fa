"""The same client for programs without an event loop: the verbs of forkypig.sdk, blocking.

    from forkypig.sync import Forky

    with Forky() as forky:
        web = forky.run(name="web")
        children = web.fork(3).children

Every verb takes the arguments, and raises the errors, of its namesake in forkypig.sdk, which documents them. The
asynchronous client works on a loop in a thread of this object's own; verbs may be called from any thread.
"""

from forkypig.sdk.process import ExecResult, Output
from forkypig.sdk.status import Check, Status
from forkypig.sdk.transfer import Copied
from forkypig.sync.client import Forky
from forkypig.sync.machine import Fork, Machine, Process
from forkypig.sync.pools import AcquiredMachine, Pool

__all__ = [
    "AcquiredMachine",
    "Check",
    "Copied",
    "ExecResult",
    "Fork",
    "Forky",
    "Machine",
    "Output",
    "Pool",
    "Process",
    "Status",
]
