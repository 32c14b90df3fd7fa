"""Processes that a test lets work and kills.

They are forked off a server of one thread, never off pytest: that has threads (gRPC's, an event loop's), and who holds
a lock when it is copied holds it for ever in the copy."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from forkypig.chunks import faults

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(  # the modules whose functions are run, or each process would import them itself
    [f"tests.component.test_{name}" for name in ("archive_crash", "archive_remotes", "chunks_crash")]
)


def start(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Both must be found by their module and name, as all that is pickled. It ends with pytest at the latest."""
    process = PROCESSES.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail("it hangs")
    return process.exitcode


def die_at(step: str, nth: int = 1) -> None:
    """This process is killed when it reaches the step for the nth time."""
    left = nth

    def reached(name: str) -> None:
        nonlocal left
        left -= name == step
        if left == 0 and name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.listen(reached)


def _work_until(step: str, nth: int, work: Callable[..., object], *arguments: Any) -> None:
    die_at(step, nth)
    work(*arguments)


def start_until(step: str, nth: int, work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Works, and is killed when it reaches the step for the nth time."""
    return start(_work_until, step, nth, work, *arguments)


def killed_at(step: str, work: Callable[..., object], *arguments: Any, nth: int = 1) -> bool:
    """Whether it came to that step, and was killed."""
    code = exit_code(start_until(step, nth, work, *arguments))
    assert code in (0, -signal.SIGKILL)
    return code != 0
