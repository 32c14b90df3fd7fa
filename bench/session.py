"""What every section is given: the instance, the results, how thorough to be, and a way to say how it goes."""

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.instance import Instance
from bench.results import Measure, Results
from forkypig.sdk.client import Forky


@dataclass(slots=True)
class Session:
    """One run of the benchmarks."""

    instance: Instance
    results: Results
    quick: bool
    began: float = field(default_factory=time.monotonic)

    @property
    def forky(self) -> Forky:
        return self.instance.forky

    @property
    def home(self) -> Path:
        return self.instance.settings.home

    def times(self, full: int, quick: int) -> int:
        """How often to repeat."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """One line of progress, on stderr: stdout is for the tables."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", file=sys.stderr, flush=True)

    def tell(self, measure: Measure) -> None:
        """One line on a measure."""
        summary = measure.summary
        labels = " ".join(f"{name}={value}" for name, value in measure.labels.items())
        self.say(
            f"{measure.section}: {measure.quantity} {labels} p50 {summary.p50:.1f} p99 {summary.p99:.1f} "
            f"max {summary.maximum:.1f} {measure.unit} (n={summary.n})"
        )


Section = Callable[[Session], Awaitable[None]]
