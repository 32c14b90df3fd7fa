"""For all tests: how long an example takes says something of the host, not of the code; Ctrl-C; and `make shake`."""

import signal

from hypothesis import settings

from tests.shaken import shake

settings.register_profile("forky", deadline=None)
settings.load_profile("forky")
shake()


def pytest_keyboard_interrupt() -> None:
    """From here on the fixtures clean up, which ends machines and daemons: a second Ctrl-C would leave them behind."""
    signal.signal(signal.SIGINT, lambda *_: None)
