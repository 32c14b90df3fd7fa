"""What is written where: documents and tables to stdout, sentences about trouble to stderr.

rich is imported when the first table is drawn: it costs 60 ms.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def document(value: Any) -> None:
    """One JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for a person, to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def trouble(text: str) -> None:
    """A sentence about what went wrong, to stderr."""
    sys.stderr.write(f"forky: {text}\n")
    sys.stderr.flush()


def console() -> "Console":
    """stdout by rich, without markup. Into a pipe lines are as long as they need to be: programs read them."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1 << 14
    return Console(markup=False, highlight=False, emoji=False, width=width, soft_wrap=False)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under headings."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console().print(drawn)


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(f"{name:<{width}}  {value}")


def ago(time_us: int) -> str:
    """How long ago, in one unit."""
    return _span(time.time() - time_us / 1e6) if time_us else ""


def left(time_us: int) -> str:
    """How long until then, in one unit."""
    return _span(time_us / 1e6 - time.time()) if time_us else ""


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def moment(time_us: int) -> str:
    """A point in time, by the clock on the wall here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_us / 1e6)) if time_us else ""


def milliseconds(value: float) -> str:
    """A duration for a person."""
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.1f} ms"
