"""forky events, top, metrics: what goes on."""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from rich.table import Table

    from forkypig import model
    from forkypig.sdk.client import Forky
    from forkypig.sdk.observe import MachineUse, Usage

app = typer.Typer()

_SINCE = re.compile(r"(\d{1,9})\s*(s|min|m|h|d)", re.ASCII)
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SORTED_BY = ("name", "cpu", "own", "shared", "pss", "pause", "state")


def _moment(text: str) -> int:
    """Microseconds since the epoch of «10m» (ago) or of a date and time. Raises BadParameter."""
    if match := _SINCE.fullmatch(text.strip()):
        return int((time.time() - int(match[1]) * _UNITS[match[2]]) * 1e6)
    try:
        return int(datetime.fromisoformat(text.strip()).astimezone().timestamp() * 1e6)
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(
            f"«{text}» is not a time: write 30s, 10m, 2h or 1d for so long ago, or 2026-11-21T14:30"
        ) from error


def _clock(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).astimezone().isoformat(" ", "seconds")[:19]


@app.command()
def events(
    after: Annotated[int, typer.Option("--after", min=0, metavar="SEQUENCE", help="Only later ones.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="At most so many; 0: all.")] = 0,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what happens, until Ctrl-C.")] = False,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="Only from then on: 10m (ago), or 2026-11-21T14:30.")
    ] = "",
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="Only of this kind: fork.done; or fork for all of fork's."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; with -f one object a line.")
    ] = False,
) -> None:
    """Print what happened, oldest first.

    With -f also what happens, as it does; also when the daemons are started again meanwhile."""
    since_us = _moment(since) if since else 0

    async def work(forky: "Forky") -> None:
        stream = forky.follow_events(after_sequence=after, since_us=since_us, kinds=kind or (), follow=follow)
        if follow:
            await _print_as_they_come(stream, limit, as_json=as_json)
            return
        found = []
        async for event in stream:
            found.append(event)
            if len(found) == limit:
                break
        if as_json:
            printing.document([documents.event(event) for event in found])
        elif not found:
            printing.say("Nothing has happened yet." if not (after or since or kind) else "Nothing of that kind.")
        else:
            rows = [(str(each.sequence), _clock(each.time_us), each.kind, each.subject, each.detail) for each in found]
            printing.table(("NR", "TIME", "EVENT", "OF", "DETAIL"), rows)

    connected(work)


async def _print_as_they_come(stream: Any, limit: int, *, as_json: bool) -> None:
    shown = 0
    async for event in stream:
        printing.say(json.dumps(documents.event(event), ensure_ascii=False) if as_json else _line(event))
        shown += 1
        if shown == limit:
            return


def _line(event: "model.Event") -> str:
    return f"{event.sequence:>6}  {_clock(event.time_us)}  {event.kind:<20} {event.subject:<14}  {event.detail}"


@app.command()
def metrics() -> None:
    """Print all metrics, in Prometheus's text format.

    FORKY_METRICS=127.0.0.1:9464 has the controller serve the same at /metrics."""

    async def work(forky: "Forky") -> None:
        sys.stdout.write(await forky.metrics())

    connected(work)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    sort: Annotated[str, typer.Option("--sort", metavar="COLUMN", help=f"Order by {', '.join(_SORTED_BY)}.")] = "cpu",
    interval: Annotated[
        float, typer.Option("--interval", min=0.5, max=3600.0, metavar="SECONDS", help="How often to look.")
    ] = 2.0,
    as_json: printing.Json = False,
) -> None:
    """Show what machines use: CPU, memory of their own and shared, pauses.

    OWN is what only this machine has, SHARED what others have too, PSS its share of all. Ctrl-C ends it."""
    if sort not in _SORTED_BY:
        raise typer.BadParameter(f"«{sort}» is no column to order by: {', '.join(_SORTED_BY)}", param_hint="--sort")

    async def work(forky: "Forky") -> None:
        import asyncio

        gauge = _Gauge(sort)
        gauge.take(await forky.usage())
        if once or as_json or not sys.stdout.isatty():
            await asyncio.sleep(1.0)  # CPU is what was used between two looks
            gauge.take(await forky.usage())
            if as_json:
                printing.document(gauge.document())
            else:
                console = printing.console()
                console.print(gauge.table(console.width))
                printing.say(gauge.summary())
            return
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        with Live(console=printing.console(), screen=True, auto_refresh=False) as live:
            while True:
                table = gauge.table(live.console.width)
                live.update(Group(Text(gauge.summary()), table), refresh=True)
                await asyncio.sleep(interval)
                gauge.take(await forky.usage())

    connected(work)


def _size(count: int | None) -> str:
    return sizes.human(count) if count is not None else ""


_COLUMNS: "dict[str, Callable[[MachineUse, float | None], str]]" = {
    "NAME": lambda use, _: use.machine.name,
    "STATE": lambda use, _: use.machine.operation or use.machine.state.value,
    "POOL": lambda use, _: use.pool,
    "CPU %": lambda _, cpu: f"{cpu:.1f}" if cpu is not None else "",
    "OWN": lambda use, _: _size(use.private_bytes),
    "SHARED": lambda use, _: _size(use.shared_bytes),
    "PSS": lambda use, _: _size(use.proportional_bytes),
    "RSS": lambda use, _: _size(use.resident_bytes),
    "LAST PAUSE": lambda use, _: printing.milliseconds(use.last_pause_ms) if use.last_pause_ms else "",
}
# Where a terminal is too narrow, in this order.
_GIVEN_UP = ("RSS", "POOL", "SHARED", "LAST PAUSE", "STATE", "PSS", "OWN")


class _Gauge:
    """The last usage, and the CPU share between the last two."""

    def __init__(self, sort: str) -> None:
        self._sort = sort
        self._usage: Usage | None = None
        self._before: dict[str, MachineUse] = {}
        self._cpu: dict[str, float] = {}

    def take(self, usage: "Usage") -> None:
        """A new look."""
        for use in usage.machines:
            before = self._before.get(use.machine.id)
            share = cpu_percent(before, use) if before is not None else None
            if share is not None:
                self._cpu[use.machine.id] = share
        self._usage = usage
        self._before = {use.machine.id: use for use in usage.machines}

    def _rows(self) -> "Sequence[tuple[MachineUse, float | None]]":
        assert self._usage is not None
        rows = [(use, self._cpu.get(use.machine.id) if use.cpu_s is not None else None) for use in self._usage.machines]
        return sorted(rows, key=lambda row: (self._order(*row), row[0].machine.name))

    def _order(self, use: "MachineUse", cpu: float | None) -> tuple[float, str]:
        """The largest first; names and states as in a dictionary."""
        numbers = {
            "cpu": cpu,
            "own": use.private_bytes,
            "shared": use.shared_bytes,
            "pss": use.proportional_bytes,
            "pause": use.last_pause_ms,
        }
        return -(numbers.get(self._sort) or 0.0), use.machine.state.value if self._sort == "state" else ""

    def document(self) -> dict[str, Any]:
        assert self._usage is not None
        return {
            "host_error": self._usage.host_error or None,
            "memory_total_bytes": self._usage.memory_total_bytes,
            "memory_available_bytes": self._usage.memory_available_bytes,
            "pauses": self._usage.pauses,
            "pause_p50_ms": self._usage.pause_p50_ms if self._usage.pauses else None,
            "pause_p99_ms": self._usage.pause_p99_ms if self._usage.pauses else None,
            "machines": [
                {
                    "id": use.machine.id,
                    "name": use.machine.name,
                    "state": use.machine.state.value,
                    "pool": use.pool or None,
                    "cpu_percent": round(cpu, 1) if cpu is not None else None,
                    "cpu_seconds": use.cpu_s,
                    "private_bytes": use.private_bytes,
                    "shared_bytes": use.shared_bytes,
                    "pss_bytes": use.proportional_bytes,
                    "resident_bytes": use.resident_bytes,
                    "last_pause_ms": use.last_pause_ms,
                }
                for use, cpu in self._rows()
            ],
        }

    def table(self, width: int) -> "Table":
        """What fits into so many characters a row; the machine and the CPU always."""
        from rich.table import Table
        from rich.text import Text

        rows = self._rows()
        columns = {heading: [cell(use, cpu) for use, cpu in rows] for heading, cell in _COLUMNS.items()}
        if not any(columns["POOL"]):
            del columns["POOL"]
        for heading in _GIVEN_UP:
            if sum(2 + max(map(len, (name, *cells))) for name, cells in columns.items()) - 2 <= width:
                break
            columns.pop(heading, None)
        drawn = Table(box=None, pad_edge=False, header_style="bold")
        for heading in columns:
            drawn.add_column(
                heading, justify="left" if heading in ("NAME", "STATE", "POOL") else "right", overflow="fold"
            )
        for cells in zip(*columns.values(), strict=True):
            drawn.add_row(*map(Text, cells))
        return drawn

    def summary(self) -> str:
        """A line on the whole."""
        usage = self._usage
        assert usage is not None
        if usage.host_error:
            return f"nothing was measured: {usage.host_error}"
        running = sum(use.cpu_s is not None for use in usage.machines)
        parts = [f"{len(usage.machines)} machines, {running} with a process"]
        own = sum(use.proportional_bytes or 0 for use in usage.machines)
        parts.append(f"{sizes.human(own)} of memory together")
        if usage.memory_total_bytes:  # the operator alone is told
            free, total = sizes.human(usage.memory_available_bytes), sizes.human(usage.memory_total_bytes)
            parts.append(f"host: {free} of {total} free")
        if usage.pauses:
            quantiles = f"p50 {usage.pause_p50_ms:.1f} ms, p99 {usage.pause_p99_ms:.1f} ms"
            parts.append(f"pause of {usage.pauses} splits: {quantiles}")
        return "; ".join(parts)


def cpu_percent(before: "MachineUse", now: "MachineUse") -> float | None:
    """Of one core, between two looks; None where that can't be told: a fork has given the machine another process."""
    if before.cpu_s is None or now.cpu_s is None or now.cpu_s < before.cpu_s:
        return None
    if before.machine.qemu_pid != now.machine.qemu_pid or now.cpu_time_us <= before.cpu_time_us:
        return None
    return (now.cpu_s - before.cpu_s) / ((now.cpu_time_us - before.cpu_time_us) / 1e6) * 100
