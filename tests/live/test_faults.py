"""What must not go wrong: a failure at every step of a fork, and the death of the daemons at every step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forkypig.hostd.faults import FORK_STEPS
from tests.live.conftest import FORKY, Instance, mostly_long

# After these the parent has split already: its successor runs, and only the children are still to come.
# Before anything, in the pause, when the successor is there, and in a child.
_KILLED_AT = ("shell", "freeze", "load", "record", "child-handshake")
_AFTER_THE_SPLIT = {"record", *(step for step in FORK_STEPS if step.startswith("child-"))}


@pytest.fixture(scope="module")
def parent(forky: Instance) -> str:
    """A machine with something that goes on counting."""
    forky.ok("run", "--name", "web")
    forky.sh("web", "echo kept > /root/kept; (while :; do echo x >> /root/ticks; sleep 0.2; done) >/dev/null 2>&1 &")
    return "web"


def faulty(forky: Instance) -> None:
    """Sees to it that the hostd that runs is one that can be made to fail."""
    if not forky.processes():
        forky.ok("up")
    if "faulty_hostd" in str(forky.processes()):
        return
    for pid, command in forky.processes().items():
        if "forkypig.hostd" in command:
            os.kill(pid, signal.SIGKILL)
    with (forky.home / "logs/hostd.log").open("ab") as log:
        subprocess.Popen(
            forky.inside(sys.executable, str(Path(__file__).parent / "faulty_hostd.py")),
            env=forky.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 60
    while not forky.hostd_serves():
        assert time.monotonic() < deadline, forky.explain(forky.run("status"))
        time.sleep(0.05)


def qemus(forky: Instance) -> int:
    return sum("qemu-system" in command for command in forky.processes().values())


def goes_on(forky: Instance, machine: str) -> None:
    """The machine is alive, has its files, and its program goes on."""
    kept, was, now = forky.sh(
        machine, "cat /root/kept; wc -l < /root/ticks; sleep 0.6; wc -l < /root/ticks"
    ).splitlines()
    assert kept == "kept"
    assert int(now) > int(was)


@pytest.mark.parametrize("step", FORK_STEPS)
def test_a_failure_at_any_step_leaves_the_parent_running_and_nothing_behind(
    forky: Instance, parent: str, step: str
) -> None:
    faulty(forky)
    before = qemus(forky)
    (forky.home / "fault").write_text(f"raise {step}")
    error = forky.fails("fork", parent, "-n", "2")
    assert f"injected at {step}" in error
    assert not (forky.home / "fault").exists()
    assert [m["name"] for m in forky.json("ps")] == [parent]
    assert forky.json("inspect", parent)["state"] == "running"
    goes_on(forky, parent)
    # The split itself can't be undone once the successor has run; its frozen process is then the snapshot.
    assert qemus(forky) <= before + (1 if step in _AFTER_THE_SPLIT else 0)


@pytest.mark.parametrize("step", mostly_long(FORK_STEPS, always=_KILLED_AT))
def test_hostd_killed_at_any_step_of_a_fork(forky: Instance, parent: str, step: str) -> None:
    faulty(forky)
    (forky.home / "fault").write_text(f"kill {step}")
    forky.run("fork", parent, "-n", "1", "--name", f"k-{step}")
    assert not (forky.home / "fault").exists()
    faulty(forky)  # the next hostd: it adopts what is there
    goes_on(forky, parent)
    for machine in forky.json("ps"):
        assert machine["state"] == "running", machine
    child = forky.json("fork", parent, "-n", "1")["children"][0]["name"]
    goes_on(forky, child)
    forky.ok("rm", *(m["name"] for m in forky.json("ps") if m["name"] != parent))


@pytest.mark.parametrize(
    "daemons",
    [
        pytest.param(("controller",), marks=pytest.mark.long),
        pytest.param(("hostd",), marks=pytest.mark.long),
        ("controller", "hostd"),
    ],
)
def test_daemons_are_killed_and_nothing_happens_to_the_machines(
    forky: Instance, parent: str, daemons: tuple[str, ...]
) -> None:
    child = forky.json("fork", parent, "-n", "1")["children"][0]["name"]
    pids = {m["name"]: m["qemu_pid"] for m in forky.json("ps")}
    forky.kill9(*daemons)
    forky.ok("up")
    assert {m["name"]: m["qemu_pid"] for m in forky.json("ps")} == pids
    for name in (parent, child):
        goes_on(forky, name)
    assert forky.json("fork", child, "-n", "1")["children"]
    for machine in forky.json("ps"):
        if machine["name"] != parent:
            forky.ok("rm", machine["name"])


def test_a_qemu_that_dies_is_told_and_the_others_go_on(forky: Instance, parent: str) -> None:
    child = forky.json("fork", parent, "-n", "1")["children"][0]["name"]
    os.kill(forky.json("inspect", child)["qemu_pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while forky.json("inspect", child)["state"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    error = forky.fails("exec", child, "--", "true")
    assert child in error
    goes_on(forky, parent)
    forky.ok("rm", child)


def test_a_fork_that_is_interrupted_leaves_nothing_half_made(forky: Instance, parent: str) -> None:
    process = subprocess.Popen([FORKY, "fork", parent, "-n", "6", "--name", "int"], env=forky.environment)
    deadline = time.monotonic() + 60
    while not any(m["name"].startswith("int") for m in forky.json("ps")):  # it was asked for
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    deadline = time.monotonic() + 60
    while any(m["name"].startswith("int") and m["state"] != "running" for m in forky.json("ps")):
        assert time.monotonic() < deadline, forky.json("ps")
        time.sleep(0.2)
    goes_on(forky, parent)
    for machine in forky.json("ps"):
        if machine["name"] != parent:
            forky.ok("rm", machine["name"])


def test_a_machine_that_is_removed_while_it_is_forked(forky: Instance, parent: str) -> None:
    child = forky.json("fork", parent, "-n", "1")["children"][0]["name"]
    forking = subprocess.Popen(
        [FORKY, "fork", child, "-n", "2", "--name", "late"],
        env=forky.environment,
        stderr=subprocess.PIPE,
    )
    forky.ok("rm", child)
    _, error = forking.communicate(timeout=60)
    assert b"Traceback" not in error
    goes_on(forky, parent)
    for machine in forky.json("ps"):
        if machine["name"] != parent:
            goes_on(forky, machine["name"])
            forky.ok("rm", machine["name"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("fork", "web", "-n", "0"), None, "1"),
        (("fork", "web", "-n", "10000"), None, "1000"),
        (("fork", "nobody", "-n", "1"), 1, "nobody"),
        (("run", "--name", "web"), 1, "web"),
        (("run", "--name", "Not/A/Name"), None, "name"),
        (("run", "--memory", "0"), None, "memory"),
        (("run", "--memory", "64T"), None, "memory"),
        (("exec", "web", "--", "/no/such/program"), 127, "no/such/program"),
        (("inspect", "../../etc"), None, "etc"),
        (("rm", "nobody"), 1, "nobody"),
    ],
)
def test_bad_input_gets_one_clear_sentence(
    forky: Instance, parent: str, arguments: tuple[str, ...], code: int | None, says: str
) -> None:
    done = forky.run(*arguments)
    error = done.stderr.decode()
    assert done.returncode == code if code is not None else done.returncode in (1, 2), error
    assert says in error.lower()
    assert "Traceback" not in error
    assert [m["name"] for m in forky.json("ps")] == [parent]
