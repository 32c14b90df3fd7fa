"""The results as tables, printed on a terminal and written as Markdown from the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import (
    alternatives,
    busy,
    chunks,
    controller,
    density,
    durable,
    everyday,
    floor,
    generations,
    network,
    pause,
    pools,
    ready,
)
from bench.results import Measure, Results
from bench.targets import Target, evaluate

_SPREAD = ("p50", "p90", "p99", "min", "max", "IQR", "n")
_WORDS = {
    "chunk_kib": "{} KiB",
    "dictionary": "{} dictionary",
    "snapshot": "{} snapshot",
    "memory_mib": "{} MiB",
    "dirty_mib": "{} MiB rewritten",
    "generation": "generation {}",
    "burst_mib": "bursts of {} MiB",
    "neighbours": "{} neighbours",
    "spinning_vcpus": "{} spinning vCPUs",
    "children": "{} children",
    "spent_by": "by {}",
    "shells": "{} started",
    "siblings": "{} alive",
    "held_mib": "{} MiB held",
    "splits": "{} splits",
    "number": "snapshot {}",
    "depth": "depth {}",
    "pool": "{} pool",
    "callers": "{} callers",
    "size": "{} machines",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are ready to print. `remark` is a sentence below the title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    remark: str = ""


def tables(results: Results) -> list[Table]:
    """All that were measured, the targets first."""
    made = [
        _targets(evaluate(results)),
        _measures(
            results,
            "The parent's pause, by memory size and by how much of it is rewritten all the time",
            pause.SECTION,
            "«pause» is from the first command of the split to the successor running, by hostd's clock. «stall» is the "
            "longest time without a tick of a guest program that ticks every millisecond, by the host's clock; "
            "«largest gap without a fork» is the same in the 250 ms before.",
        ),
        _measures(results, "By generation: child of a child of a child", generations.SECTION),
        _measures(results, "One machine forked again and again", generations.REPEATED),
        _measures(results, "With all cores busy in other machines", busy.SECTION),
        _measures(results, "While earlier snapshots are packed", busy.PACKING),
        _measures(results, "While the disk is busy", busy.DISK),
        _measures(results, "Time to ready", ready.SECTION),
        _measures(results, "A network of its own, against the user-mode network", network.SECTION),
        _measures(results, "The floor: starting QEMU", floor.SECTION),
        _measures(results, "Host memory of children", density.SECTION),
        _measures(results, "Every day", everyday.SECTION),
        _measures(results, "Snapshots on disk", durable.SECTION),
        _measures(
            results,
            "Acquiring machines of a pool",
            pools.SECTION,
            "«refilling»: the pool makes a machine for each that is taken, behind everything else, all along.",
        ),
        _measures(results, "A crowd at a pool: all come at once, and give back at once", pools.CROWD),
        _measures(
            results,
            "The controller, before a host that answers at once",
            controller.SECTION,
            "«adds» is what a call takes through the controller, less what the same call takes at the host. The "
            "host is one of the tests, in the process that measures; the controller is the daemon, in its own.",
        ),
        _measures(
            results,
            "Sizes of chunks, on a guest's memory",
            chunks.SECTION,
            "«memory in use» has no pages of zeros; «bytes stored» has the index in it. Speeds are of one core's CPU "
            "time, the fault is of a file in the page cache, verified.",
        ),
        _measures(results, "The chunk store, on the same memory", chunks.STORE),
        _measures(
            results,
            "The alternatives, on the same guest and host",
            alternatives.SECTION,
            "Both QEMUs of a copy are started ahead, its state goes to the page cache and is not forced to the disk, "
            "and nobody takes on an identity: a user's own copy would be slower than this.",
        ),
    ]
    return [table for table in made if table.rows]


def _targets(found: list[Target]) -> Table:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        (target.name, target.asked, target.found, words[target.reached], target.where if not target.reached else "")
        for target in found
    ]
    return Table("Targets", ("what", "asked", "found", "reached", "where it goes"), rows)


def _measures(results: Results, title: str, section: str, remark: str = "") -> Table:
    found = [measure for measure in results.measures if measure.section == section]
    return Table(title, ("what", "when", "unit", *_SPREAD), [_row(measure) for measure in found], remark)


def _row(measure: Measure) -> tuple[str, ...]:
    summary = measure.summary
    spread = (summary.p50, summary.p90, summary.p99, summary.minimum, summary.maximum, summary.iqr)
    return (
        measure.quantity,
        ", ".join(_WORDS.get(label, "{}").format(value) for label, value in measure.labels.items()),
        measure.unit,
        *(f"{value:.1f}" for value in spread),
        str(summary.n),
    )


def markdown(results: Results, charts: Sequence[str]) -> str:
    """The whole report. `charts` are file names beside it."""
    facts = results.facts
    lines = [
        "# Benchmark results",
        "",
        "Written by `python -m bench`; docs/benchmarks.md says how each is measured.",
        "",
    ]
    lines += ["| fact | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += [f"- {note}" for note in results.notes] + ([""] if results.notes else [])
    lines += [f"![{name}]({name})" for name in charts] + ([""] if charts else [])
    for table in tables(results):
        lines += [f"## {table.title}", ""] + ([table.remark, ""] if table.remark else [])
        lines += [_line(table.columns), _line(tuple("---" for _ in table.columns))]
        lines += [_line(row) for row in table.rows] + [""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
