"""`python -m bench [--quick] [--only SECTION …] [--out DIRECTORY]`: measures all in one run."""

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import (
    alternatives,
    busy,
    charts,
    chunks,
    controller,
    density,
    durable,
    everyday,
    facts,
    floor,
    generations,
    instance,
    network,
    pause,
    pools,
    ready,
)
from bench.results import Results
from bench.session import Section, Session
from bench.tables import markdown, tables
from forkypig.daemon import logs
from forkypig.errors import ForkyError

# In this order: what is measured first must not suffer from what leaves most behind.
SECTIONS: dict[str, Section] = {
    pause.SECTION: pause.run,
    generations.SECTION: generations.run,
    floor.SECTION: floor.run,
    ready.SECTION: ready.run,
    density.SECTION: density.run,
    everyday.SECTION: everyday.run,
    alternatives.SECTION: alternatives.run,
    chunks.SECTION: chunks.run,
    network.SECTION: network.run,
    busy.SECTION: busy.run,
    busy.PACKING: busy.packing,
    busy.DISK: busy.disk,
    durable.SECTION: durable.run,
    pools.SECTION: pools.run,
    controller.SECTION: controller.run,
}


def main() -> int:
    """0 when everything that was asked for was measured, whether or not the targets are reached."""
    arguments = _arguments()
    logs.configure("bench", "warning")  # we use parts of hostd ourselves
    try:
        results = asyncio.run(_measure(arguments.only or list(SECTIONS), arguments.quick))
    except ForkyError as error:
        print(f"the benchmark broke off: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("the benchmark was interrupted; nothing was written", file=sys.stderr)
        return 130
    _write(results, arguments.out)
    _print(results)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions, in two minutes: to see that it works")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=instance.CHECKOUT / "bench/results", help="where to write")
    return parser.parse_args()


async def _measure(sections: list[str], quick: bool) -> Results:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    began = time.monotonic()
    async with instance.instance() as here:
        results = Results(await facts.gather(here))
        results.facts["quick"] = quick
        session = Session(here, results, quick, began)
        for name, section in SECTIONS.items():
            if name in sections:
                session.say(f"{name} …")
                await section(session)
    results.facts["took_s"] = round(time.monotonic() - began)
    return results


def _write(results: Results, out: Path) -> None:
    """Replaces what an earlier run wrote there."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = dict(charts.charts(results))
    for name, document in drawn.items():
        (out / name).write_text(document)
    (out / "results.json").write_text(json.dumps(results.document(), indent=1) + "\n")
    (out / "results.md").write_text(markdown(results, list(drawn)))


def _print(results: Results) -> None:
    console = Console()
    if not console.is_terminal:  # 80 columns, which rich takes for a pipe, would cut the figures
        console = Console(width=140)
    for table in tables(results):
        drawn = Table(title=table.title, title_justify="left")
        for column in table.columns:
            number = column in ("p50", "p90", "p99", "min", "max", "IQR", "n")
            drawn.add_column(column, justify="right" if number else "left", no_wrap=number)
        for row in table.rows:
            drawn.add_row(*(cell.replace("**", "") for cell in row))
        console.print(drawn)
    for note in results.notes:
        console.print(note)


if __name__ == "__main__":
    sys.exit(main())
