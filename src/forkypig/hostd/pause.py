"""What happened when in the pause of a split: for the log, for traces, and for who asks how long it was."""

from dataclasses import dataclass

from forkypig import tracing


@dataclass(frozen=True, slots=True)
class Marks:
    """When what happened in a pause, by time.perf_counter() in seconds."""

    began: float
    stopped: float
    saved: float
    frozen: float
    handed: float  # to the successor: the load begins
    running: float

    @property
    def pause_ms(self) -> float:
        return (self.running - self.began) * 1000

    def steps(self) -> list[tracing.Step]:
        """One after the other; `load` ends with the successor's vCPUs running."""
        return [
            tracing.Step("stop", self.began, self.stopped),
            tracing.Step("save", self.stopped, self.saved),
            tracing.Step("freeze", self.saved, self.frozen),
            tracing.Step("hand over", self.frozen, self.handed),
            tracing.Step("load and run", self.handed, self.running),
        ]

    def fields(self) -> dict[str, float]:
        """For the log: how far into the pause each ended, in ms."""
        ends = {"stopped_ms": self.stopped, "saved_ms": self.saved, "pause_ms": self.running}
        return {name: round((end - self.began) * 1000, 2) for name, end in ends.items()}
