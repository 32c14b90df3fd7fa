"""How far a build has come, in parts of a hundred."""

from collections.abc import Callable

from forkypig.model import Progress

TOTAL = 100

# Where a step begins and how many lines about single packages its program prints; shares of a 45 s build. mmdebstrap
# names its steps with "I: …" lines.
_MMDEBSTRAP = {
    "I: running apt-get update": ("reading the package lists", 1, 0),
    "I: downloading packages": ("downloading packages", 5, 0),
    "I: extracting archives": ("unpacking the base system", 9, 0),
    "I: installing essential": ("installing the base system", 20, 170),
    "I: installing remaining": ("installing packages", 40, 150),
}
_OURS = {
    "downloading the kernel": 75,
    "unpacking the kernel": 80,
    "finishing the files": 90,
    "making the disk": 93,
    "checking": 97,
    "done": TOTAL,
}
_STARTS = sorted([start for _, start, _ in _MMDEBSTRAP.values()] + list(_OURS.values()))


class Steps:
    """Turns what programs print into a bar that never goes back."""

    def __init__(self, progress: Callable[[Progress], None]) -> None:
        self._progress = progress
        self._step, self._start, self._lines, self._seen = "starting", 0, 0, 0
        self._done = 0

    def reach(self, step: str) -> None:
        """A step of our own begins."""
        self._enter(step, _OURS[step], 0)

    def waiting(self, step: str) -> None:
        """Something has to be waited for; nobody knows how long."""
        self._progress(Progress(step))

    def on_line(self, line: str) -> None:
        """A line of mmdebstrap's output."""
        for beginning, (step, start, lines) in _MMDEBSTRAP.items():
            if line.startswith(beginning):
                self._enter(step, start, lines)
                return
        if self._lines and line.startswith(("Unpacking ", "Setting up ")):
            self._seen += 1
            end = next(start for start in _STARTS if start > self._start)
            part = min(self._seen / self._lines, 1.0) * (end - self._start)
            self._report(self._start + int(part))

    def _enter(self, step: str, start: int, lines: int) -> None:
        self._step, self._start, self._lines, self._seen = step, start, lines, 0
        self._report(start, always=True)

    def _report(self, done: int, *, always: bool = False) -> None:
        if always or done > self._done:
            self._done = max(done, self._done)
            self._progress(Progress(self._step, self._done, TOTAL))
