"""Structured logging: an event name with fields, a line each, to stderr (which `forky up` points at a file)."""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog


class _Stderr:
    """stderr, whose disk may be full: a daemon must not end because a line can't be logged.

    Not an io.TextIOBase, which is flushed once more when the interpreter has taken everything else away."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def configure(daemon: str, level: str) -> None:
    """Sets up structlog for this process; every line names the daemon."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
    )
    structlog.contextvars.bind_contextvars(daemon=daemon)
