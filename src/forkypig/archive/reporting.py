"""How far a transfer is, told at a bearable rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_EVERY_S = 0.1

Say = Callable[[str, int, int], None]  # step, done, total (0: not known)


@dataclass(slots=True)
class Meter:
    """Counts bytes of one step at a time."""

    say: Say
    step: str = ""
    total: int = 0
    done: int = 0
    _said: float = field(default=0.0)

    def begin(self, step: str, total: int = 0) -> None:
        """A step begins."""
        self.step, self.total, self.done = step, total, 0
        self.say(step, 0, total)
        self._said = time.monotonic()

    def advance(self, count: int) -> None:
        """So many bytes more."""
        self.at(self.done + count, self.total)

    def at(self, done: int, total: int) -> None:
        """So many bytes in all."""
        self.done, self.total = done, total
        if time.monotonic() - self._said >= _EVERY_S or done == total:
            self.say(self.step, done, total)
            self._said = time.monotonic()
