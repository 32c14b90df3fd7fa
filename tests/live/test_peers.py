"""Two controllers on one PostgreSQL and one real host: the one that leads is killed, and stands still."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.component.postgres_rig import postgres
from tests.live.conftest import Instance, new_instance

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Instance, Instance]]:
    """An instance, and a second controller on its database and its hostd."""
    with postgres() as server, tempfile.TemporaryDirectory(prefix="forky-test-", dir="/tmp") as home:
        one = new_instance(FORKY_DATABASE=server.url("postgres"))
        other = Instance(
            Path(home), FORKY_DATABASE=server.url("postgres"), FORKY_HOSTD=str(one.home / "run/hostd.sock")
        )
        try:
            one.ok("up")
            one.ok("run", "--name", "web")
            other.ok("up")
            yield one, other
        finally:
            try:
                other.end()
            finally:
                one.end()
                subprocess.run(["rm", "-rf", "--one-file-system", str(one.home)], check=False)


def machines(instance: Instance) -> dict[str, Any]:
    return {machine["name"]: machine for machine in instance.json("ps")}


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def forking(instance: Instance, *arguments: str) -> threading.Thread:
    """`forky fork` behind our back."""
    thread = threading.Thread(target=lambda: instance.run("fork", *arguments))
    thread.start()
    return thread


def test_killed_in_the_middle_of_a_fork(two: tuple[Instance, Instance]) -> None:
    one, other = two
    assert machines(other)["web"]["id"] == machines(one)["web"]["id"]
    pid = one.pid("controller")
    fork = forking(one, "web", "-n", "2")
    wait_until(lambda: len(machines(other)) == 3)  # it is written down
    os.kill(pid, signal.SIGKILL)
    # Finished, since hostd carries a fork to its end; or undone, when it was killed before it had asked.
    wait_until(lambda: {m["state"] for m in machines(other).values()} == {"running"})
    left = set(machines(other))
    assert left in ({"web"}, {"web", "web-1", "web-2"})
    assert len(list((one.home / "machines").iterdir())) == len(left)
    assert other.sh("web", "echo alive") == "alive"
    fork.join(60)
    one.ok("up")
    assert set(machines(one)) == left
    if children := left - {"web"}:
        one.ok("rm", *children)


def test_stood_still_and_went_on(two: tuple[Instance, Instance]) -> None:
    one, other = two
    pid = other.pid("controller")  # whichever leads: both stand still once
    for stopped, works in ((pid, one), (one.pid("controller"), other)):
        os.kill(stopped, signal.SIGSTOP)
        try:
            time.sleep(5.0)  # longer than its lease
            works.ok("fork", "web", "-n", "1", "--name", "kid")
        finally:
            os.kill(stopped, signal.SIGCONT)
        stale = other if works is one else one
        wait_until(lambda stale=stale: stale.run("exec", "kid-1", "--", "true").returncode == 0)
        wait_until(lambda stale=stale: stale.run("rm", "kid-1").returncode == 0)
        assert set(machines(works)) == set(machines(stale)) == {"web"}
    fences = json.loads((one.home / "fences.json").read_text())
    assert len(fences) == 2
