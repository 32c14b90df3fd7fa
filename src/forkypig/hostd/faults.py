"""Points at which a test can make a step fail or kill the daemon. In production nothing listens."""

from collections.abc import Callable

# Every step of a fork, in the order in which they happen; a test injects a failure at each.
FORK_STEPS = (
    "reserve",
    "overlay",
    "shell",
    "prepare",
    "switch",
    "stop",
    "save",
    "freeze",
    "bind",
    "load",
    "record",
    "child-overlay",
    "child-shell",
    "child-network",
    "child-load",
    "child-handshake",
    "child-record",
)

RESTORE_STEPS = (
    "restore-shell",
    "child-overlay",
    "child-shell",
    "restore-hold",
    "restore-switch",
    "restore-load",
    "child-load",
    "child-handshake",
    "restore-record",
    "restore-end",
)
HIBERNATE_STEPS = ("hibernate-stop", "hibernate-bind", "hibernate-pack", "hibernate-record")
ACQUIRE_STEPS = ("acquire-run", "acquire-record")
PACK_STEPS = ("pack", "pack-record", "pack-end")

_listener: Callable[[str], None] | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Calls `listener` with the name of each step as it begins; what it raises, the step raises."""
    global _listener
    _listener = listener


def reach(step: str) -> None:
    """A step begins."""
    if _listener is not None:
        _listener(step)
