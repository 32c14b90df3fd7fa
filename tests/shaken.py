"""Event loops in which some steps of tasks come late, so that tasks overtake each other as they do on a busy computer.

FORKY_TEST_SHAKE=PART:MS, say 0.1:40, is for `make shake`: of all steps that PART comes late, by MS ms on average
(exponentially distributed, at most 20 times as much). asyncio promises no order among tasks, so whatever fails then can
fail. What comes from sockets, threads and timers keeps its order, which gRPC and asyncpg rely on.
"""

import asyncio
import os
import random
from collections.abc import Callable
from contextvars import Context
from typing import Any

_STEPS = ("TaskStepMethWrapper", "task_wakeup")  # a task's first step, and every other, as CPython's loop is given them
_AT_MOST = 20


class _Loop(asyncio.SelectorEventLoop):
    part = 0.0
    mean_s = 0.0

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:
        name = getattr(callback, "__name__", type(callback).__name__)
        if name in _STEPS and random.random() < self.part:
            late_s = min(random.expovariate(1 / self.mean_s), _AT_MOST * self.mean_s)
            return self.call_later(late_s, callback, *args, context=context)
        return super().call_soon(callback, *args, context=context)


class _Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop


def shake() -> None:
    """All loops from here on, where the environment asks for it."""
    if wish := os.environ.get("FORKY_TEST_SHAKE"):
        part, mean_ms = wish.split(":")
        _Loop.part, _Loop.mean_s = float(part), float(mean_ms) / 1000
        asyncio.set_event_loop_policy(_Policy())
