"""A progress bar on stderr, for what takes over a second, and only on a terminal."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from forkypig.cli.sizes import human

if TYPE_CHECKING:
    import asyncio

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from forkypig import model

_PATIENCE_S = 1.0


class Display:
    """Shows how far something is, from the second second on. Use on an event loop, as a context manager."""

    def __init__(self) -> None:
        self._step, self._done, self._total, self._are_bytes = "", 0, 0, False
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        import asyncio

        if sys.stderr.isatty():
            self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._show)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_progress(self, progress: "model.Progress") -> None:
        """Told by the SDK."""
        self._step, self._done, self._total = progress.step, progress.done, progress.total
        self._update()

    def on_bytes_of(self, progress: "model.Progress") -> None:
        """Told by the SDK, of what is counted in bytes."""
        self._are_bytes = True
        self.on_progress(progress)

    def on_bytes(self, done: int, total: int) -> None:
        """Told by a copy, in its own thread."""
        self._done, self._total, self._are_bytes = done, total, True
        self._update()

    def copying(self, what: str) -> Self:
        """Names what `on_bytes` is about."""
        self._step = f"copying {what}"
        return self

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._step, total=None, amount="")
        self._bar.start()
        self._update()

    def _update(self) -> None:
        if self._bar is None or self._task is None:
            return
        self._bar.update(
            self._task, description=self._step, completed=self._done, total=self._total or None, amount=self._amount()
        )

    def _amount(self) -> str:
        if not self._are_bytes:
            return f"{self._done}/{self._total}" if self._total else ""
        if not self._total:
            return human(self._done) if self._done else ""
        return f"{human(self._done)} of {human(self._total)}"
