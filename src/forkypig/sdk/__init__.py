"""The public client API: asynchronous here, with a blocking face in forkypig.sync.

It speaks to nothing but the controller's socket, except `local`, which starts and ends the daemons of one home.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forkypig.model.access import AuditEntry as AuditEntry
    from forkypig.sdk.access import Token as Token
    from forkypig.sdk.bisect import Bisected as Bisected
    from forkypig.sdk.bisect import Trial as Trial
    from forkypig.sdk.client import Forky as Forky
    from forkypig.sdk.machine import Fork as Fork
    from forkypig.sdk.machine import Machine as Machine
    from forkypig.sdk.pools import AcquiredMachine as AcquiredMachine
    from forkypig.sdk.pools import Pool as Pool
    from forkypig.sdk.process import ExecResult as ExecResult
    from forkypig.sdk.process import Output as Output
    from forkypig.sdk.process import Process as Process
    from forkypig.sdk.status import Check as Check
    from forkypig.sdk.status import Status as Status
    from forkypig.sdk.transfer import Copied as Copied

_HOMES = {
    "AcquiredMachine": "pools",
    "AuditEntry": "access",
    "Bisected": "bisect",
    "Check": "status",
    "Copied": "transfer",
    "ExecResult": "process",
    "Fork": "machine",
    "Forky": "client",
    "Machine": "machine",
    "Output": "process",
    "Pool": "pools",
    "Process": "process",
    "Status": "status",
    "Token": "access",
    "Trial": "bisect",
}
__all__ = [
    "AcquiredMachine",
    "AuditEntry",
    "Bisected",
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
    "Token",
    "Trial",
]


def __getattr__(name: str) -> object:
    # Lazy, so that `forky --help` does not pay for gRPC.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"forkypig.sdk.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
