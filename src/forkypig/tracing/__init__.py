"""Traces, by OpenTelemetry: what one command did, from the command line to QEMU's steps.

A trace is begun by a client that was told to (FORKY_TRACE_FILE, or OpenTelemetry's own OTEL_EXPORTER_OTLP_ENDPOINT),
and goes on in every daemon that was told so too: calls carry its context as W3C says. Where nobody was told, nothing of
OpenTelemetry is imported, and every function here returns at once.

What is measured inside a machine's pause is noted as numbers and becomes spans when the pause is over (`record`).
"""

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from forkypig.tracing.recorder import Recorder

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FILE = "FORKY_TRACE_FILE"
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()

_recorder: "Recorder | None" = None


class Step(NamedTuple):
    """Something that was done, by time.perf_counter() in seconds."""

    name: str
    began: float
    ended: float


def is_wanted() -> bool:
    """Whether the environment asks for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name) for name in (FILE, *_ENDPOINTS))


def start(service: str) -> None:
    """Records from now on, if the environment asks for it. `service` is the process's name in traces."""
    global _recorder
    if _recorder is None and is_wanted():
        from forkypig.tracing.recorder import Recorder

        _recorder = Recorder(service, os.environ.get(FILE, ""))


def close() -> None:
    """Sends what is left, and records no more. Takes two seconds at most."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        recorder.close()


def root(name: str) -> AbstractContextManager[Any]:
    """The block begins a trace, or is part of the one that the environment names (TRACEPARENT)."""
    return _recorder.root(name) if _recorder is not None else _NOTHING


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[Any]:
    """The block is a part of the trace under way, if there is one."""
    return _recorder.span(name, attributes) if _recorder is not None else _NOTHING


def record(name: str, steps: Sequence[Step], **attributes: str | int | float) -> None:
    """A part of the trace under way that is over, from the first step's beginning to the last one's end, with a part
    for each step."""
    if _recorder is not None:
        _recorder.record(name, steps, attributes)


def serving(method: str, context: Any) -> AbstractContextManager[Any]:
    """The block answers a call, and is part of its caller's trace, if the call carries one."""
    return _recorder.serving(method, context) if _recorder is not None else _NOTHING


def interceptors() -> list[Any]:
    """For a gRPC channel, so that its calls carry the trace under way; none where nothing is recorded."""
    if _recorder is None:
        return []
    from forkypig.tracing.rpc import interceptors

    return interceptors(_recorder)
