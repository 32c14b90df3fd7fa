"""What a user does with snapshots: going back, sleeping and waking, starting again from one, finding the bad one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from forkypig.hostd.faults import HIBERNATE_STEPS, RESTORE_STEPS
from forkypig.sync import Forky
from tests.live.conftest import FORKY, Instance
from tests.live.test_faults import faulty, goes_on, qemus

# From here on the machine is the new one: what fails is only the end of the old one.
_AFTER_THE_RESTORE = ("restore-end",)


@pytest.fixture(scope="module")
def box(forky: Instance) -> str:
    """A machine with a program that counts in memory, and two moments of it: «one» and «two»."""
    forky.ok("up")
    faulty(forky)
    forky.ok("run", "--name", "box", "-p", "127.0.0.1:18099:99")
    forky.sh("box", "echo kept > /root/kept; (while :; do echo x >> /root/ticks; sleep 0.2; done) >/dev/null 2>&1 &")
    forky.sh("box", _COUNT)
    _moment(forky, "one")
    _moment(forky, "two")
    _moment(forky, "three")
    return "box"


# In memory alone, and whole at any moment.
_COUNT = (
    "(cd /dev/shm; n=0; while :; do n=$((n+1)); echo $n > .n; mv .n n; sleep 0.1; done) >/dev/null 2>&1 & "
    "until test -e /dev/shm/n; do sleep 0.1; done"
)


def _moment(forky: Instance, name: str) -> None:
    forky.sh("box", f"echo {name} > /root/moment; echo {name} > /dev/shm/moment; sync")
    made = forky.json("snapshot", "box", "--tag", name, "-m", f"the moment {name}")
    assert made["message"] == f"the moment {name}"


def _count(forky: Instance, machine: str) -> int:
    return int(forky.sh(machine, "cat /dev/shm/n"))


def _who(forky: Instance, machine: str) -> tuple[object, ...]:
    """What a machine keeps whatever becomes of its memory; by the SDK, a process less than by the command line."""
    with Forky(home=forky.home, start=False) as client:
        found = client.get(machine)
        inside = found.exec(["sh", "-c", "hostname; cat /etc/machine-id"]).stdout
        return found.id, found.name, found.info.address, found.info.config.ports, inside


def test_log_and_tags(forky: Instance, box: str) -> None:
    chain = forky.json("log", box)
    assert [each["tag"] for each in chain[:3]] == ["three", "two", "one"]
    assert [each["id"] for each in forky.json("log", "two")] == [each["id"] for each in chain[1:]]
    two = chain[1]["id"]
    assert forky.json("inspect", two[:-1])["id"] == two
    assert "--force" in forky.fails("tag", "one", "two")
    assert "--force" in forky.fails("tag", two, "deux")
    assert forky.json("tag", "two", "deux", "--force")["tag"] == "deux"
    assert "two" in forky.fails("inspect", "two")
    assert forky.json("tag", "deux", "two", "--force")["message"] == "the moment two"
    assert "template" in forky.fails("tag", "--delete", chain[-1]["id"])
    assert [each["tag"] for each in forky.json("tag")] == ["one", "three", "two"]


def test_restore_brings_memory_and_files_back_and_keeps_who_it_is(forky: Instance, box: str) -> None:
    was = _who(forky, box)
    random = forky.sh(box, "cat /proc/sys/kernel/random/uuid")
    forky.ok("restore", box, "one", "--snapshot", "latest")
    first = forky.sh(box, "cat /root/moment /dev/shm/moment /proc/sys/kernel/random/uuid")
    assert first.split()[:2] == ["one", "one"]
    assert _who(forky, box) == was
    counted, pid = _count(forky, box), forky.json("inspect", box)["qemu_pid"]
    forky.ok("restore", box, "one")
    assert pid not in forky.processes(), "the old process is there"
    again = forky.sh(box, "cat /root/moment /dev/shm/moment /proc/sys/kernel/random/uuid")
    assert again.split()[:2] == ["one", "one"]
    assert len({random, first.split()[2], again.split()[2]}) == 3, "the same random numbers after two restores"
    assert abs(float(forky.sh(box, "date +%s.%N")) - time.time()) < 2
    time.sleep(0.3)
    assert counted > 0
    assert _count(forky, box) > 0
    forky.ok("restore", box, "latest")
    assert forky.sh(box, "cat /root/moment") == "three"


def test_restore_of_a_stopped_machine_and_of_a_failed_one(forky: Instance, box: str) -> None:
    was = _who(forky, box)
    forky.ok("stop", "--force", box)
    forky.ok("restore", box, "two")
    assert _who(forky, box) == was
    os.kill(forky.json("inspect", box)["qemu_pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while forky.json("inspect", box)["state"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    forky.ok("restore", box, "two")
    assert _who(forky, box) == was
    assert forky.sh(box, "cat /root/moment /dev/shm/moment") == "two\ntwo"
    goes_on(forky, box)


def test_a_restore_that_fails_at_any_step_leaves_the_machine_as_it_was(forky: Instance, box: str) -> None:
    was, before, counted = _who(forky, box), qemus(forky), _count(forky, box)
    for step in ("child-shell", "restore-switch", "child-handshake", "restore-record"):
        assert step in RESTORE_STEPS
        (forky.home / "fault").write_text(f"raise {step}")
        assert f"injected at {step}" in forky.fails("restore", box, "one"), step
        assert _count(forky, box) > counted, step
        assert qemus(forky) <= before, step  # fewer when a snapshot has been packed meanwhile
    assert _who(forky, box) == was
    goes_on(forky, box)


@pytest.mark.parametrize("step", ["restore-record", "restore-end"])
def test_hostd_killed_in_a_restore(forky: Instance, box: str, step: str) -> None:
    forky.ok("restore", box, "two")
    was, before, counted = _who(forky, box), qemus(forky), _count(forky, box)
    (forky.home / "fault").write_text(f"kill {step}")
    forky.run("restore", box, "three")
    assert not (forky.home / "fault").exists()
    faulty(forky)
    assert _who(forky, box) == was
    moment = "three" if step in _AFTER_THE_RESTORE else "two"
    assert forky.sh(box, "cat /root/moment /dev/shm/moment") == f"{moment}\n{moment}"
    goes_on(forky, box)
    assert (_count(forky, box) > counted) or step in _AFTER_THE_RESTORE
    assert qemus(forky) <= before  # the shells that waited for a use of the template are gone with the old hostd


def test_a_hibernation_that_fails_leaves_the_machine_running(forky: Instance, box: str) -> None:
    counted = _count(forky, box)
    for step in ("hibernate-bind", "hibernate-pack"):
        assert step in HIBERNATE_STEPS
        (forky.home / "fault").write_text(f"raise {step}")
        assert f"injected at {step}" in forky.fails("hibernate", box), step
        assert forky.json("inspect", box)["state"] == "running", step
    assert _count(forky, box) > counted
    goes_on(forky, box)


def test_hostd_killed_in_a_hibernation(forky: Instance, box: str) -> None:
    for step, state in (("hibernate-pack", "running"), ("hibernate-record", "hibernated")):
        (forky.home / "fault").write_text(f"kill {step}")
        forky.run("hibernate", box)
        faulty(forky)
        deadline = time.monotonic() + 60
        while forky.json("inspect", box)["state"] != state:
            assert time.monotonic() < deadline, forky.json("inspect", box)
            time.sleep(0.1)
    forky.ok("wake", box)
    goes_on(forky, box)


def test_hibernation_holds_no_process_and_goes_on_after_down_and_up(forky: Instance, box: str) -> None:
    was, counted = _who(forky, box), _count(forky, box)
    pid = forky.json("inspect", box)["qemu_pid"]
    asleep = forky.json("hibernate", box)
    assert asleep["state"] == "hibernated"
    assert asleep["qemu_pid"] is None
    assert not Path(f"/proc/{pid}").exists()
    assert forky.json("inspect", asleep["snapshot"])["packed"] is True
    for verb in ("exec", "start", "fork", "snapshot"):
        error = forky.fails(verb, box, *(("--", "true") if verb == "exec" else ()))
        assert f"forky wake {box}" in error
    forky.ok("down")
    assert not forky.processes()
    forky.ok("up")
    forky.ok("wake", box)
    now = _count(forky, box)
    assert counted < now < counted + 400, "the program goes on where it was"
    assert _who(forky, box) == was
    goes_on(forky, box)
    assert "not hibernated" in forky.fails("wake", box)
    assert "stop" in forky.ok("stop", "--force", box)
    assert f"forky start {box}" in forky.fails("hibernate", box)


def test_run_from_a_snapshot(forky: Instance, box: str) -> None:
    made = forky.json("run", "--from", "one", "--name", "late", "--restart", "always")
    assert made["restart"] == "always"
    assert made["network"]["ports"] == []
    assert forky.sh("late", "cat /root/moment; hostname") == "one\nlate"
    assert "leave out" in forky.fails("run", "--from", "one", "--memory", "1G", code=2)
    assert "nobody" in forky.fails("run", "--from", "nobody")


def test_a_machine_that_is_always_to_run_comes_back_by_itself(forky: Instance, box: str) -> None:
    """Its QEMU dies while hostd is away: first it has a packed snapshot to come back from, then none."""
    was = _who(forky, "late")
    boots = forky.json("run", "--name", "boots", "--restart", "always")
    forky.sh("boots", "echo disk > /root/kept; sync")
    pids = [forky.json("inspect", "late")["qemu_pid"], boots["qemu_pid"]]
    forky.kill9("hostd")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    forky.ok("up")
    deadline = time.monotonic() + 60
    while any(forky.json("inspect", name)["state"] != "running" for name in ("late", "boots")):
        assert time.monotonic() < deadline, forky.explain(forky.run("ps"))
        time.sleep(0.2)
    assert _who(forky, "late") == was
    assert forky.sh("late", "cat /dev/shm/moment") == "one"
    assert forky.sh("boots", "cat /root/kept") == "disk"
    forky.ok("rm", "late", "boots")


def test_bisect_finds_the_first_bad_one(forky: Instance, box: str) -> None:
    command = ["--", "sh", "-c", "read m < /root/moment; case $m in one) exit 0;; two) exit 1;; *) exit 3;; esac"]
    found = json.loads(forky.ok("bisect", "three", "--good", "one", "--bad", "three", "--json", *command))
    assert found["first_bad"]["tag"] == "two"
    assert [trial["verdict"] for trial in found["trials"]] == ["bad"]
    assert not [m["name"] for m in forky.json("ps") if m["name"].startswith("bisect")]
    interrupted = subprocess.Popen(
        [FORKY, "bisect", "three", "--good", "one", "--", "sleep", "60"], env=forky.environment
    )
    deadline = time.monotonic() + 30
    while not any(m["name"].startswith("bisect") and m["state"] == "running" for m in forky.json("ps")):
        assert time.monotonic() < deadline
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(30) == 130
    assert not [m["name"] for m in forky.json("ps") if m["name"].startswith("bisect")]
    assert "no ancestor" in forky.fails("bisect", "three", "--good", "three", "--bad", "one", *command, code=2)
