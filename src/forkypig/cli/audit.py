"""forky audit."""

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from forkypig import errors
from forkypig.cli import durations, printing
from forkypig.cli.runtime import connected

if TYPE_CHECKING:
    from forkypig.model.access import AuditEntry
    from forkypig.sdk.client import Forky

app = typer.Typer()


@app.command()
def audit(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is being done.")] = False,
    since: Annotated[str, typer.Option("--since", metavar="SPAN|TIME", help="10m, 2d, 2026-11-21T14:00, …")] = "",
    as_json: printing.Json = False,
) -> None:
    """Show who did what, when, with which result. With --json a line each."""
    since_us = _since_us(since)

    async def work(forky: "Forky") -> None:
        async for entry in forky.audit(since_us=since_us, follow=follow):
            printing.say(_as_json(entry) if as_json else _line(entry))

    connected(work)


def _since_us(text: str) -> int:
    if not text:
        return 0
    try:
        return int((time.time() - durations.seconds(text)) * 1e6)
    except ValueError:
        try:
            return int(datetime.fromisoformat(text).timestamp() * 1e6)
        except (ValueError, OverflowError) as error:
            raise errors.InvalidRequest(
                f"--since: «{text[:40]}» is neither a span as 10m nor a time as 2026-11-21T14:00"
            ) from error


def _as_json(entry: "AuditEntry") -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(entry), ensure_ascii=False)


def _line(entry: "AuditEntry") -> str:
    who = f"{entry.who or '-'} ({entry.tenant or '-'}, {entry.role or '-'})"
    took = printing.milliseconds(entry.duration_ms)
    words = (printing.moment(entry.time_us), who, entry.method, entry.about, entry.result, took, entry.peer)
    return "  ".join(word for word in words if word)
