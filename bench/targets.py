"""What the figures are to reach (on two cores under TCG, with disk, network card and agent), and whether they do."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import (
    alternatives,
    busy,
    controller,
    density,
    durable,
    everyday,
    floor,
    generations,
    hostlog,
    network,
    pause,
    pools,
    ready,
)
from bench.results import Measure, Results
from bench.stats import percentile

_SAME = 0.20


@dataclass(frozen=True, slots=True)
class Target:
    """One figure that is asked for. `reached` is None when the run did not measure it."""

    name: str
    asked: str
    found: str
    reached: bool | None
    where: str = ""  # where the time or the memory goes, when it is missed


def evaluate(results: Results) -> list[Target]:
    """All targets, in the order of the issue."""
    return [
        *_pause(results),
        *_same(results),
        *_busy(results),
        *_ready(results),
        *_network(results),
        *_durable(results),
        *_pools(results),
        *_controller(results),
        *_rest(results),
    ]


def _at_most(name: str, samples: list[float], fraction: float, limit: float, unit: str, where: str = "") -> Target:
    asked = f"≤ {limit:g} {unit}"
    if not samples:
        return Target(name, asked, "not measured", None)
    value = percentile(samples, fraction)
    return Target(name, asked, f"{value:.1f} {unit} (n={len(samples)})", value <= limit, where)


def _parts(results: Results, section: str) -> str:
    """The two parts of the pause, from hostd's log."""
    saved = results.samples(section, "stop and save")
    loaded = results.samples(section, "freeze and load")
    if not saved:
        return ""
    return (
        f"stop and save p50 {percentile(saved, 0.5):.1f}, p99 {percentile(saved, 0.99):.1f} ms; freeze and load by the "
        f"successor p50 {percentile(loaded, 0.5):.1f}, p99 {percentile(loaded, 0.99):.1f} ms"
    )


def _pause(results: Results) -> Iterator[Target]:
    samples, parts = results.samples(pause.SECTION, "pause"), _parts(results, pause.SECTION)
    yield _at_most("pause, p50 over all sizes and loads", samples, 0.5, 20, "ms", parts)
    yield _at_most("pause, p99 over all sizes and loads", samples, 0.99, 50, "ms", parts)


def _controller(results: Results) -> Iterator[Target]:
    for engine, limit in (("SQLite", 3), ("PostgreSQL", 5)):
        for call in controller.CALLS:
            samples = results.samples(controller.SECTION, "adds", engine=engine, call=call)
            yield _at_most(f"what the controller adds to «{call}», {engine}, p50", samples, 0.5, limit, "ms")
        listed = results.samples(controller.SECTION, "listing 100 of 10,000 machines", engine=engine)
        yield _at_most(f"listing 100 of 10,000 machines, {engine}, p50", listed, 0.5, 20, "ms")
        failed = results.samples(controller.SECTION, "of 1000 calls at once failed", engine=engine)
        yield _at_most(f"of 1000 calls at once cancelled or failed, {engine}", failed, 1.0, 0, "calls")


def _same(results: Results) -> Iterator[Target]:
    clean = results.select(pause.SECTION, "pause", dirty_mib=0)
    yield _alike("pause at 512 MiB and 8 GiB, clean", _with(clean, memory_mib=512), _with(clean, memory_mib=8192))
    for memory_mib in (512, 8192):
        size = results.select(pause.SECTION, "pause", memory_mib=memory_mib)
        name = f"pause clean and with 256 MiB being rewritten, {memory_mib} MiB"
        yield _alike(name, _with(size, dirty_mib=0), _with(size, dirty_mib=256))
    chain = results.select(generations.SECTION, "pause")
    last = _with(chain, generation=generations.DEEPEST)
    yield _alike(f"pause in generation 1 and {generations.DEEPEST}", _with(chain, generation=1), last)


def _with(measures: list[Measure], **labels: int) -> Measure | None:
    return next((measure for measure in measures if labels.items() <= measure.labels.items()), None)


def _alike(name: str, one: Measure | None, other: Measure | None) -> Target:
    """Medians that differ by a fifth at most, of the first."""
    asked = f"the same, ±{_SAME:.0%}"
    if one is None or other is None:
        return Target(name, asked, "not measured", None)
    first, second = one.summary, other.summary
    change = second.p50 / first.p50 - 1
    where = f"quartiles {first.iqr:.1f} and {second.iqr:.1f} ms apart" if abs(change) > _SAME else ""
    return Target(name, asked, f"{first.p50:.1f} and {second.p50:.1f} ms ({change:+.0%})", abs(change) <= _SAME, where)


def _busy(results: Results) -> Iterator[Target]:
    samples = results.samples(busy.SECTION, "pause")
    yield _at_most("pause with all cores busy, p50", samples, 0.5, 35, "ms", _parts(results, busy.SECTION))


def _ready(results: Results) -> Iterator[Target]:
    one = results.samples(ready.SECTION, "all children ready", children=1)
    boot = results.samples(alternatives.SECTION, "cold boot")
    name = "one child ready, p50, against a cold boot"
    if one and boot:
        child, cold = percentile(one, 0.5), percentile(boot, 0.5)
        found = f"{child:.0f} of {cold:.0f} ms, 1/{cold / child:.1f}"
        yield Target(name, "≤ 1/8", found, child <= cold / 8, _spenders(results, 1))
    else:
        yield Target(name, "≤ 1/8", "not measured", None)
    many = results.samples(ready.SECTION, "all children ready", children=50)
    shells = results.samples(floor.SECTION, "CPU time of a bare shell")
    name = "50 children ready, p50, against the floor"
    if many and shells:
        took, least = percentile(many, 0.5), floor.floor_ms(shells, 50)
        found = f"{took:.0f} ms, {took / least:.2f} × the floor of {least:.0f} ms"
        yield Target(name, "≤ 2.5 ×", found, took <= 2.5 * least, _spenders(results, 50))
    else:
        yield Target(name, "≤ 2.5 ×", "not measured", None)


def _spenders(results: Results, children: int) -> str:
    """Which steps took the time while so many children were made, and who used the CPU."""
    spent = results.select(ready.SECTION, "CPU time of the fork", children=children)
    parts = [f"{measure.labels['spent_by']} {measure.summary.p50:.0f} ms" for measure in spent]
    steps = [
        f"{step} {percentile(samples, 0.5):.0f} ms"
        for step in hostlog.STEPS
        if (samples := results.samples(ready.SECTION, step, children=children))
    ]
    told = [("steps of a child, p50: ", steps), ("CPU time of one fork: ", parts)]
    return "; ".join(title + ", ".join(found) for title, found in told if found)


def _network(results: Results) -> Iterator[Target]:
    """What a network of its own adds, medians against the user-mode network's, and what a client notices."""
    for quantity, limit in (("pause", 2), ("one child ready", 30)):
        nat, user = (results.samples(network.SECTION, quantity, kind=kind) for kind in ("nat", "user"))
        name, asked = f"{quantity}: a network of its own adds", f"≤ {limit} ms"
        if nat and user:
            with_it, without = percentile(nat, 0.5), percentile(user, 0.5)
            found = f"{with_it - without:+.1f} ms ({with_it:.1f} and {without:.1f}, n={len(nat)})"
            yield Target(name, asked, found, with_it - without <= limit)
        else:
            yield Target(name, asked, "not measured", None)
    answers = results.samples(network.SECTION, "answer over an open connection")
    yield _at_most("slowest answer over an open connection to a machine that forks", answers, 1.0, 150, "ms")
    lost = results.samples(network.SECTION, "retransmits")
    yield _at_most("segments sent again over it", lost, 1.0, 0, "segments")


def _durable(results: Results) -> Iterator[Target]:
    """Snapshots on disk, and what starts from them."""
    section = durable.SECTION
    for name, rates in (
        ("the memory of a first snapshot", results.samples(section, "packed", number=1)),
        *(
            (what, results.samples(section, "packed", what=f"after {what}"))
            for what in (f"{durable.REWRITTEN_MIB} MiB of {kind} bytes" for kind in ("half random", "random"))
        ),
    ):
        rate = percentile(rates, 0.5) if rates else 0.0
        found = f"{rate:.0f} MiB/s (n={len(rates)})" if rates else "not measured"
        yield Target(f"packing, of {name}", "≥ 300 MiB/s", found, rate >= 300 if rates else None)
    for what, limit in (("first snapshot", 90), ("after 10 MiB of changes", 15)):
        grew = results.samples(section, "store grew", what=what)
        yield _at_most(f"store: {what} of a machine that uses 200 MiB", grew[-1:], 0.5, limit, "MiB")
    warm = results.samples(section, "first exec in a child", state="in memory")
    for state, limit in (("packed", 1.3), ("packed, page cache empty", 2.0)):
        samples = results.samples(section, "first exec in a child", state=state)
        yield _ratio(f"first exec in a child of a snapshot that is {state}", samples, warm, limit)
    for quantity in ("start", "PSS after the start"):
        deep, flat = (results.samples(section, quantity, depth=depth) for depth in (16, 1))
        yield _ratio(f"{quantity} from depth 16 against depth 1", deep, flat, 1.1)
    restores, forks = (
        results.samples(section, "goes on", way=way) for way in ("restore in place", "fork of a snapshot")
    )
    yield _ratio("restore in place against a fork", restores, forks, 2.0)
    packing = results.samples(busy.PACKING, "pause")
    calm = results.samples(pause.SECTION, "pause", memory_mib=512, dirty_mib=256)
    yield _ratio("pause while packing runs against the pause without", packing, calm, 1.2)


def _ratio(name: str, samples: list[float], against: list[float], limit: float) -> Target:
    """Medians."""
    if not samples or not against:
        return Target(name, f"≤ {limit:g} ×", "not measured", None)
    value, base = percentile(samples, 0.5), percentile(against, 0.5)
    return Target(name, f"≤ {limit:g} ×", f"{value / base:.2f} × ({value:.0f} and {base:.0f})", value <= limit * base)


def _pools(results: Results) -> Iterator[Target]:
    for engine in ("SQLite", "PostgreSQL"):
        samples = results.samples(pools.SECTION, "acquire of a ready machine", engine=engine, pool="refilling")
        yield _at_most(f"acquire of a ready machine while refills run, {engine}, p50", samples, 0.5, 10, "ms")
        yield _at_most(f"acquire of a ready machine while refills run, {engine}, p99", samples, 0.99, 50, "ms")
    late = results.samples(pools.CROWD, "callers past their deadline")
    overtaken = results.samples(pools.CROWD, "callers given a machine before one who came earlier")
    name, asked = "200 acquires at once on a pool of 20 end in order", "no error, in turn"
    if not late:
        yield Target(name, asked, "not measured", None)
    else:
        found = f"{late[0]:.0f} past their deadline, {overtaken[0]:.0f} out of turn"
        yield Target(name, asked, found, not late[0] and not overtaken[0])


def _rest(results: Results) -> Iterator[Target]:
    yield _at_most("forky --help, p50", results.samples(everyday.SECTION, "forky --help"), 0.5, 200, "ms")
    for siblings in (1, 10):
        of = {"state": "idle", "siblings": siblings}
        parts = [
            f"{part} {percentile(results.samples(density.SECTION, part, **of), 0.5):.1f} MiB"
            for part in density.PARTS
            if results.samples(density.SECTION, part, **of)
        ]
        samples = results.samples(density.SECTION, "PSS", **of)
        name = f"PSS of an idle child of a 512 MiB machine, p50, {siblings} alive"
        yield _at_most(name, samples, 0.5, 40, "MiB", ", ".join(parts))
