"""What records: OpenTelemetry's tracer with a batch of spans that a thread of its own exports."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forkypig.tracing import Step

_SOON_MS = 500  # a file is read by people and tests
_CLOSE_MS = 2000
_LARGEST_WRITE = 1 << 20  # several processes append to one file: each batch in one piece
_MOST_SAID = 100  # different sentences that are remembered

_propagator = TraceContextTextMapPropagator()


class Recorder:
    """One process's traces, into a file or to a collector."""

    def __init__(self, service: str, file: str) -> None:
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.addHandler(_sentences())
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.namespace": "forkypig"}),
            shutdown_on_exit=False,
        )
        processor = BatchSpanProcessor(_to_file(Path(file)), schedule_delay_millis=_SOON_MS) if file else None
        self._provider.add_span_processor(processor or BatchSpanProcessor(_to_collector()))
        self._tracer = self._provider.get_tracer("forkypig")

    def close(self) -> None:
        self._provider.force_flush(_CLOSE_MS)
        self._provider.shutdown()

    @contextlib.contextmanager
    def root(self, name: str) -> Iterator[None]:
        around = {key.lower(): os.environ[key] for key in ("TRACEPARENT", "TRACESTATE") if key in os.environ}
        with self._spanning(name, _propagator.extract(around), SpanKind.INTERNAL, {}):
            yield

    def span(self, name: str, attributes: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        if not is_under_way():
            return contextlib.nullcontext()
        return self._spanning(name, None, SpanKind.INTERNAL, attributes)

    def serving(self, method: str, context: Any) -> contextlib.AbstractContextManager[None]:
        carried = {
            key: value for key, value in context.invocation_metadata() or () if key in ("traceparent", "tracestate")
        }
        parent = _propagator.extract(carried)
        if not trace.get_current_span(parent).get_span_context().is_valid:
            return contextlib.nullcontext()  # nobody's trace: daemons begin none
        return self._spanning(method, parent, SpanKind.SERVER, {"rpc.system": "grpc"})

    def record(self, name: str, steps: Sequence[Step], attributes: Mapping[str, Any]) -> None:
        if not is_under_way() or not steps:
            return
        epoch_ns = time.time_ns() - time.perf_counter_ns()

        def at(seconds: float) -> int:
            return epoch_ns + round(seconds * 1e9)

        whole = self._tracer.start_span(name, start_time=at(steps[0].began), attributes=attributes)
        inside = trace.set_span_in_context(whole)
        for step in steps:
            part = self._tracer.start_span(step.name, inside, start_time=at(step.began))
            part.end(at(step.ended))
        whole.end(at(steps[-1].ended))

    def calling(self, method: str) -> tuple[trace.Span, list[tuple[str, str]]]:
        """A span for a call that is made now, and the metadata that it carries."""
        made = self._tracer.start_span(method, kind=SpanKind.CLIENT, attributes={"rpc.system": "grpc"})
        carried: dict[str, str] = {}
        _propagator.inject(carried, trace.set_span_in_context(made))
        return made, list(carried.items())

    @contextlib.contextmanager
    def _spanning(
        self, name: str, parent: Context | None, kind: SpanKind, attributes: Mapping[str, Any]
    ) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
        ) as made:
            try:
                yield
            except Exception as error:
                # Its sentence, not its traceback: that is for logs.
                made.set_status(Status(StatusCode.ERROR, str(error)))
                made.set_attribute("error.type", type(error).__name__)
                raise


def is_under_way() -> bool:
    """Whether there is a trace to add to."""
    return trace.get_current_span().get_span_context().is_valid


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


def _to_file(path: Path) -> SpanExporter:
    """One JSON object a line, appended, for as long as the process lives."""
    return ConsoleSpanExporter(out=path.open("a", buffering=_LARGEST_WRITE), formatter=_line)


def _to_collector() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    # Its own default of 10 s would keep a command waiting for a collector that is away.
    timeout = None if "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else _CLOSE_MS / 1000
    return OTLPSpanExporter(timeout=timeout)


def _sentences() -> logging.Handler:
    """Says each thing once: a collector that is away would have a line for every batch."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in said:
            return False
        if len(said) < _MOST_SAID:
            said.add(text)
        return True

    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    handler.addFilter(is_new)
    handler.setFormatter(logging.Formatter("forky: traces are not complete: %(message)s"))
    return handler
