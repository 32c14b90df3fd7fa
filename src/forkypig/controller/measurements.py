"""What the controller has measured since it started: pauses, times to ready, commands. In Prometheus's own types."""

from collections import deque

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics

from forkypig.model import ForkResult

# A pause is some 15 ms; a busy host and its disk make more of it.
_PAUSE_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_READY_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0)
_EXEC_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)
_REMEMBERED = 1000  # splits, for quantiles

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series each that nobody asks for


class Measurements:
    """Counted here, told by metrics.py."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._pause = Histogram(
            "forky_fork_pause_seconds",
            "How long a running machine stood still when it was split.",
            buckets=_PAUSE_S,
            registry=self.registry,
        )
        self._ready = Histogram(
            "forky_machine_ready_seconds",
            "From a request to the confirmation of the new machine's agent, by what made the machine.",
            ("by",),
            buckets=_READY_S,
            registry=self.registry,
        )
        for by in ("run", "fork"):
            self._ready.labels(by)
        self._exec_start = Histogram(
            "forky_exec_start_seconds",
            "From the request to run a command in a machine until it was started.",
            buckets=_EXEC_S,
            registry=self.registry,
        )
        self._exec = Histogram(
            "forky_exec_duration_seconds",
            "From the request to run a command in a machine to its end; commands with a terminal are left out.",
            buckets=_EXEC_S,
            registry=self.registry,
        )
        self._newest: deque[float] = deque(maxlen=_REMEMBERED)
        self._last: dict[str, float] = {}

    def forked(self, result: ForkResult) -> None:
        """A fork or a snapshot was made."""
        if result.parent is not None and result.pause_ms > 0:
            self._pause.observe(result.pause_ms / 1000)
            self._newest.append(result.pause_ms)
            self._last[result.parent] = result.pause_ms
        for child in result.children:
            self._ready.labels("fork").observe(child.ready_ms / 1000)

    def ran(self, ready_ms: float) -> None:
        """A machine was run."""
        self._ready.labels("run").observe(ready_ms / 1000)

    def started(self, seconds: float) -> None:
        """A command in a machine was started."""
        self._exec_start.observe(seconds)

    def ended(self, seconds: float) -> None:
        """A command in a machine has ended."""
        self._exec.observe(seconds)

    def last_pause_ms(self, machine: str) -> float:
        """Of its last split; 0 where there was none."""
        return self._last.get(machine, 0.0)

    def keep_only(self, machines: set[str]) -> None:
        """Others are gone."""
        self._last = {machine: pause for machine, pause in self._last.items() if machine in machines}

    def pause_quantiles_ms(self) -> tuple[float, float, int]:
        """Median, 99th percentile (nearest rank) and number of the newest splits; zeros: there were none."""
        ordered = sorted(self._newest)
        if not ordered:
            return 0.0, 0.0, 0
        last = len(ordered) - 1
        return ordered[round(0.5 * last)], ordered[round(0.99 * last)], len(ordered)
