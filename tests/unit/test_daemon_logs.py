"""Logging on a full disk."""

import errno
import io
import sys

import pytest
import structlog

from forkypig.daemon import logs


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_that_can_not_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    logs.configure("test", "info")
    try:
        structlog.get_logger().warning("said", why="the disk is full")
        monkeypatch.setattr(sys, "stderr", heard := io.StringIO())
        structlog.get_logger().warning("said again")
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
    assert "said again" in heard.getvalue()
