"""Traces of a daemon: it also runs where they can't be written."""

import structlog

from forkypig import tracing

log = structlog.get_logger()


def begin(service: str) -> None:
    """Records from now on, if the environment asks for it."""
    try:
        tracing.start(service)
    except OSError as error:
        log.warning("no traces", file=error.filename, error=error.strerror)
