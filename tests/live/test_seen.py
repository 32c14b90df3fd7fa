"""What can be seen of a real fork: its trace, its events, the machines' memory and CPU, metrics."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import FORKY, Instance, new_instance


@pytest.fixture(scope="module")
def forky() -> Iterator[Instance]:
    with tempfile.TemporaryDirectory(prefix="forky-trace-") as directory:
        instance = new_instance(FORKY_TRACE_FILE=f"{directory}/trace.jsonl")
        try:
            yield instance
        finally:
            instance.end()
            subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


def test_one_fork_is_seen_from_the_command_line_to_qemu(forky: Instance) -> None:
    forky.ok("run", "--name", "web")
    following = subprocess.Popen(
        forky.inside(FORKY, "events", "-f", "--json", "--kind", "fork"), env=forky.environment, stdout=subprocess.PIPE
    )
    made = forky.json("fork", "web", "-n", "2")
    forky.ok("exec", "web-1", "--", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    try:
        assert following.stdout is not None
        kinds = [json.loads(following.stdout.readline())["kind"] for _ in range(2)]
    finally:
        following.terminate()
        following.wait()
    assert kinds == ["fork.asked", "fork.done"]
    _check_usage(forky, made["pause_ms"])
    forky.ok("rm", "--all")
    forky.ok("down")  # the daemons export what is left
    _check_trace(Path(forky.environment["FORKY_TRACE_FILE"]), made["pause_ms"])


def _check_usage(forky: Instance, pause_ms: float) -> None:
    top = forky.json("top", "--sort", "name")
    assert [each["name"] for each in top["machines"]] == ["web", "web-1", "web-2"]
    for machine in top["machines"]:
        assert 0 < machine["private_bytes"] < machine["pss_bytes"] < machine["resident_bytes"]
        assert machine["shared_bytes"] > 1 << 20  # a fork shares its snapshot
        assert machine["cpu_percent"] is not None
    assert top["machines"][0]["last_pause_ms"] == pause_ms
    metrics = forky.ok("metrics")
    assert "forky_fork_pause_seconds_count 1.0\n" in metrics
    served = next(line for line in metrics.splitlines() if line.startswith("forky_pager_fault_seconds_count"))
    assert float(served.split()[1]) > 0
    assert metrics.count("forky_machine_cpu_seconds_total{") == 3


def _check_trace(file: Path, pause_ms: float) -> None:
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    root = next(span for span in spans if span["name"] == "forky fork")
    spans = [span for span in spans if span["context"]["trace_id"] == root["context"]["trace_id"]]
    assert _tree(spans, root) == (
        "forky fork",
        ("Controller/Fork", ("Controller/Fork", ("Host/ForkMachine", ("Host/ForkMachine", *_FORK)))),
    )
    by_name = {span["name"]: span for span in spans}
    steps = [by_name[name] for name in ("stop", "save", "freeze", "hand over")]
    pause = by_name["pause"]
    loads = [span for span in spans if span["name"] == "load and run" and span["parent_id"] == _id(pause)]
    total_ms = sum(map(_ms, [*steps, *loads]))
    assert total_ms == pytest.approx(_ms(pause), abs=0.05)  # they fit into the pause, and leave nothing out
    assert _ms(pause) == pytest.approx(pause_ms, abs=0.05)
    services = {span["resource"]["attributes"]["service.name"] for span in spans}
    assert services == {"forky", "forky-controller", "forky-hostd"}


_FORK = (
    ("prepare",),
    ("pause", ("stop",), ("save",), ("freeze",), ("hand over",), ("load and run",)),
    ("move the agent's channel",),
    ("child", ("shell",), ("network",), ("load and run",), ("handshake",)),
    ("child", ("shell",), ("network",), ("load and run",), ("handshake",)),
)


def _tree(spans: list[dict[str, Any]], root: dict[str, Any]) -> Any:
    """Names, in order; without the question whether there is room, which is asked at times."""
    here = [span for span in spans if span["parent_id"] == _id(root) and span["name"] != "Host/GetPressure"]
    children = sorted(here, key=lambda s: s["start_time"])
    return (root["name"], *(_tree(spans, child) for child in children))


def _id(span: dict[str, Any]) -> str:
    return str(span["context"]["span_id"])


def _ms(span: dict[str, Any]) -> float:
    return (_when(span["end_time"]) - _when(span["start_time"])) * 1000


def _when(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
