"""Which charts there are: each from the results, left out when its section did not run."""

from collections.abc import Iterator

from bench import alternatives, density, floor, generations, pause, ready
from bench.results import Measure, Results
from bench.svg import Chart, Point, Series

_WHISKERS = "median; whiskers from the minimum to the 90th percentile"


def charts(results: Results) -> Iterator[tuple[str, str]]:
    """File names and SVG documents."""
    for name, chart in (
        (
            "pause.svg",
            _pause(results, "pause", "The parent's pause does not depend on memory", ("asked: p50 ≤ 20 ms", 20)),
        ),
        ("stall.svg", _pause(results, "stall", "The stall that the outside world sees", None)),
        ("generations.svg", _generations(results)),
        ("repeated.svg", _repeated(results)),
        ("ready.svg", _ready(results)),
        ("density.svg", _density(results)),
        ("alternatives.svg", _alternatives(results)),
    ):
        if chart is not None:
            yield name, chart.render()


def _point(measure: Measure) -> Point:
    summary = measure.summary
    return Point(summary.p50, summary.minimum, summary.p90)


def _pause(results: Results, quantity: str, title: str, limit: tuple[str, float] | None) -> Chart | None:
    measures = results.select(pause.SECTION, quantity)
    if not measures:
        return None
    cells = {(measure.labels["memory_mib"], measure.labels["dirty_mib"]): _point(measure) for measure in measures}
    sizes = list(dict.fromkeys(size for size, _ in cells))
    series = [
        Series(
            f"{dirty} MiB rewritten all the time" if dirty else "clean", [cells.get((size, dirty)) for size in sizes]
        )
        for dirty in dict.fromkeys(dirty for _, dirty in cells)
    ]
    names = [f"{size} MiB" for size in sizes]
    return Chart(title, _WHISKERS, "memory of the machine", "ms", names, series, limit)


def _generations(results: Results) -> Chart | None:
    measures = results.select(generations.SECTION, "pause")
    if not measures:
        return None
    names = [str(measure.labels["generation"]) for measure in measures]
    series = [Series("pause", [_point(measure) for measure in measures])]
    return Chart("Pause by generation", _WHISKERS, "generation", "ms", names, series, ("asked: p50 ≤ 20 ms", 20))


def _repeated(results: Results) -> Chart | None:
    samples = results.samples(generations.REPEATED, "pause")
    if not samples:
        return None
    points = [Point(sample, sample, sample) for sample in samples]
    names = [str(number) for number in range(1, len(samples) + 1)]
    series = [Series("pause", points)]
    return Chart("One machine forked again and again", "each pause", "fork", "ms", names, series)


def _ready(results: Results) -> Chart | None:
    measures = results.select(ready.SECTION, "all children ready")
    if not measures:
        return None
    series = [Series("until the last child is ready", [_point(measure) for measure in measures])]
    shells = results.samples(floor.SECTION, "CPU time of a bare shell")
    if shells:
        floors = [floor.floor_ms(shells, int(measure.labels["children"])) for measure in measures]
        series.append(Series("floor: CPU time of bare QEMUs ÷ cores", [Point(value, value, value) for value in floors]))
    names = [str(measure.labels["children"]) for measure in measures]
    return Chart("Time to ready", _WHISKERS, "children of one fork", "ms", names, series, logarithmic=True, bars=True)


def _density(results: Results) -> Chart | None:
    measures = results.select(density.SECTION, "PSS")
    if not measures:
        return None
    names = [f"{measure.labels['state']}, {measure.labels['siblings']} alive" for measure in measures]
    series = [Series("PSS", [_point(measure) for measure in measures])]
    limit = ("asked: an idle child ≤ 40 MiB", 40.0)
    return Chart("Host memory of a child of a 512 MiB machine", _WHISKERS, "", "MiB", names, series, limit, bars=True)


def _alternatives(results: Results) -> Chart | None:
    """Two bars a way: how long the original stands still, and when the second machine runs."""
    ways: dict[str, tuple[Point | None, Point | None]] = {}
    for dirty in (0, 256):
        for measure in results.select(pause.SECTION, "pause", memory_mib=512, dirty_mib=dirty):
            one = results.select(ready.SECTION, "all children ready", children=1)
            ways[f"fork, {dirty} MiB dirty"] = (_point(measure), _point(one[0]) if one and not dirty else None)
    for measure in results.select(alternatives.SECTION, "pause"):
        way, held = measure.labels["way"], measure.labels["held_mib"]
        runs = results.select(alternatives.SECTION, "copy runs", **measure.labels)
        ways[f"{str(way).split()[0]}, {held} MiB held"] = (_point(measure), _point(runs[0]) if runs else None)
    for measure in results.select(alternatives.SECTION, "cold boot"):
        ways["cold boot"] = (None, _point(measure))
    if not results.select(alternatives.SECTION, "cold boot"):
        return None
    series = [
        Series("the original stands still", [still for still, _ in ways.values()]),
        Series("the second machine runs (of a fork: is ready)", [runs for _, runs in ways.values()]),
    ]
    return Chart("Ways to a second machine", _WHISKERS, "", "ms", list(ways), series, logarithmic=True, bars=True)
