"""Traces: what carries them, where they go, and that nothing is paid where nobody asked for them."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from forkypig import tracing
from tests.component.fake_controller import Instance

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # from W3C's own examples


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    made = Instance(tmp_path / "home")
    await made.start()
    yield made
    await made.stop()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What OTLP is sent to."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def run(instance: Instance, *words: str, **environment: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forkypig.cli.main", *words),
        env={**os.environ, "FORKY_HOME": str(instance.home), **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode is not None
    return child.returncode, said.decode()


def test_nothing_is_imported_where_nobody_asks() -> None:
    script = (
        "import sys, forkypig.cli.main, forkypig.sdk.client, forkypig.controller.app, forkypig.hostd.services.host\n"
        "from forkypig import tracing\n"
        "tracing.start('x')\n"
        "with tracing.root('a'), tracing.span('b'): tracing.record('c', [])\n"
        "assert tracing.interceptors() == []\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    disabled = {"OTEL_SDK_DISABLED": "true", "FORKY_TRACE_FILE": "/nonexistent/file"}
    assert subprocess.run([sys.executable, "-c", script], env={**_plain(), **disabled}, check=False).returncode == 0


def _plain() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "FORKY_TRACE"))}


async def test_to_a_collector_and_as_part_of_a_callers_trace(instance: Instance) -> None:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    endpoint = f"http://127.0.0.1:{port}"
    code, said = await run(instance, "ps", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, TRACEPARENT=PARENT)
    await server.stop(None)
    assert (code, said) == (0, "")
    assert collector.services == {"forky"}
    by_name = {span.name: span for span in collector.spans}
    root, call = by_name["forky ps"], by_name["Controller/ListMachines"]
    assert root.trace_id.hex() == call.trace_id.hex() == PARENT.split("-")[1]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    assert call.parent_span_id == root.span_id
    assert not [name for name in by_name if "Health" in name]


async def test_a_collector_that_is_away_costs_seconds_and_no_more(instance: Instance) -> None:
    began = time.monotonic()
    code, said = await run(instance, "ps", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert code == 0
    assert "Traceback" not in said
    assert all(line.startswith("forky: traces are not complete") for line in said.splitlines())
    assert time.monotonic() - began < 30  # it ended at all; how soon is a matter of the computer


def test_what_is_wrong_with_a_collector_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    logger = logging.getLogger("opentelemetry")
    before = logger.handlers[:]
    tracing.start("test")
    try:
        for _ in range(3):
            logger.error("it is away")
        assert capsys.readouterr().err == "forky: traces are not complete: it is away\n"
    finally:
        tracing.close()
        logger.handlers[:] = before


async def test_a_failure_is_marked(instance: Instance, tmp_path: Path) -> None:
    code, _ = await run(instance, "inspect", "nobody", FORKY_TRACE_FILE=str(tmp_path / "t"))
    assert code == 1
    spans = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    root = next(span for span in spans if span["name"] == "forky inspect")
    assert root["status"]["status_code"] == "ERROR"
    assert "nobody" in root["status"]["description"]
    assert root["attributes"]["error.type"] == "NotFound"


def test_steps_become_parts_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.FILE, str(tmp_path / "t"))
    tracing.start("test")
    now = time.perf_counter()
    with tracing.root("whole"):
        tracing.record(
            "pause", [tracing.Step("stop", now - 3, now - 2), tracing.Step("save", now - 2, now - 1)], id="x"
        )
    tracing.record("nobody's", [tracing.Step("stop", now, now)])
    tracing.close()
    spans = {span["name"]: span for span in map(json.loads, (tmp_path / "t").read_text().splitlines())}
    assert set(spans) == {"whole", "pause", "stop", "save"}
    pause = spans["pause"]["context"]["span_id"]
    assert [spans[name]["parent_id"] for name in ("stop", "save")] == [pause, pause]
    assert spans["pause"]["start_time"] == spans["stop"]["start_time"]
    assert spans["pause"]["end_time"] == spans["save"]["end_time"]
    assert spans["stop"]["end_time"] == spans["save"]["start_time"]
    assert spans["pause"]["attributes"] == {"id": "x"}
