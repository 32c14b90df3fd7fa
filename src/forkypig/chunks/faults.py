"""Points at which a test can make a step fail or kill the process. In production nothing listens."""

from collections.abc import Callable

WRITE_STEPS = (
    "part-made",
    "chunks-written",
    "index-written",
    "part-synced",
    "pack-renamed",
    "packs-synced",
    "manifest-written",
    "manifest-renamed",
)
COLLECT_STEPS = ("collect-marked", "collect-moved", "collect-numbered", "collect-pack-removed")

_listener: Callable[[str], None] | None = None


def listen(listener: Callable[[str], None] | None) -> None:
    """Calls `listener` with the name of each step as it is done; what it raises, the step raises."""
    global _listener
    _listener = listener


def reach(step: str) -> None:
    """A step is done."""
    if _listener is not None:
        _listener(step)
