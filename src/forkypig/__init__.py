"""Forky Pig forks running virtual machines the way a kernel forks processes.

`from forkypig import Forky` is the asynchronous client, `from forkypig.sync import Forky` the blocking one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky as Forky
    from forkypig.sdk.machine import Machine as Machine

__all__ = ["Forky", "Machine"]


def __getattr__(name: str) -> object:
    # gRPC takes 100 ms to import, so it waits until somebody asks for the client.
    if name == "Forky":
        from forkypig.sdk.client import Forky

        return Forky
    if name == "Machine":
        from forkypig.sdk.machine import Machine

        return Machine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
