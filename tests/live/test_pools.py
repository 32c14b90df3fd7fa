"""Pools with real machines: who is acquired is a machine of its own, and nothing of it is left for the next."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from forkypig import errors
from forkypig.hostd.faults import ACQUIRE_STEPS
from forkypig.sync import AcquiredMachine, Forky
from tests.live.conftest import FORKY, Instance, mostly_long
from tests.live.test_faults import faulty

_WHO = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; date +%s.%N"


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def client(forky: Instance) -> Any:
    """A connection, and a pool of three in which all are ready."""
    forky.ok("pool", "create", "py", "--from", "debian-12", "--target", "3", "--max", "6")
    with Forky(home=forky.home, start=False) as connected:
        ready(connected, 3)
        yield connected


def ready(client: Forky, count: int, name: str = "py") -> Any:
    def is_so() -> Any:
        status = client.pool(name).status()
        wanted = min(status.wanted, status.pool.max - status.acquired)  # refills begin when nobody is being served
        return status if status.ready >= max(count, wanted) and not status.filling else None

    return eventually(is_so, f"{count} ready in {name}")


def sh(machine: AcquiredMachine, script: str) -> str:
    done = machine.exec(["sh", "-c", script])
    assert done.exit_code == 0, done
    return done.stdout.decode().strip()


def test_each_has_an_identity_of_its_own_and_the_time_is_right(forky: Instance, client: Forky) -> None:
    assert forky.json("ps") == []
    waiting = forky.json("ps", "--all")
    assert [(each["pool"], each["state"]) for each in waiting] == [("py", "paused")] * 3
    forky.fails("exec", waiting[0]["name"], "--", "true")
    forky.ok("rm", "--all")
    assert client.pool("py").status().ready == 3
    time.sleep(3)  # the machines stand still, the time does not
    with client.pool("py").acquire() as one, client.pool("py").acquire() as two:
        seen = []
        for machine in (one, two):
            before = time.time()
            seen.append(sh(machine, _WHO).split())
            assert before - 1 < float(seen[-1][4]) < time.time() + 1
        for was, other in zip(seen[0][:4], seen[1][:4], strict=True):
            assert was != other
        assert seen[0][0] == one.name
        assert one.info.address != two.info.address
        assert {each["name"] for each in forky.json("ps")} == {one.name, two.name}
    assert forky.json("ps") == []


def test_nothing_of_the_last_user_is_left(forky: Instance, client: Forky) -> None:
    first = forky.json("acquire", "py", "--label", "job=7")
    assert first["lease"]["labels"] == {"job": "7"}
    machine = first["name"]
    forky.sh(machine, "echo mine > /root/secret; echo mine > /dev/kmsg; (sleep 7777 >/dev/null 2>&1 &)")
    forky.ok("release", machine, "--recycle")
    assert "no machine" in forky.fails("exec", machine, "--", "true")
    ready(client, 3)
    held = [client.pool("py").acquire() for _ in range(3)]
    for next_one in held:
        assert next_one.id != first["id"]
        assert next_one.info.address != first["address"]
        assert sh(next_one, "ls /root; cat /proc/[0-9]*/comm | grep -x sleep || true") == ""
        assert b"mine" not in b"".join(next_one.console())
        next_one.release()
    assert client.pool("py").status().leases == ()


def test_leases_end_unless_they_are_used(forky: Instance, client: Forky) -> None:
    ready(client, 2)
    idle, used = (client.pool("py").acquire(ttl_s=2) for _ in range(2))
    began = time.monotonic()
    assert sh(used, "sleep 5; echo there") == "there"
    assert time.monotonic() - began >= 5
    eventually(lambda: not any(machine.id == idle.id for machine in client.list()), "the idle one is there")
    eventually(lambda: client.list() == [], "the used one is there, and nobody uses it any more")
    assert [event.subject for event in client.events() if event.kind == "lease.expired"] == [idle.id, used.id]
    with pytest.raises(errors.NotFound):
        used.renew()


def test_who_waits_gets_a_machine_in_turn(forky: Instance, client: Forky) -> None:
    client.pool("py").scale(target=1, max=2)
    held = [client.pool("py").acquire(wait_s=60) for _ in range(2)]
    eventually(lambda: client.pool("py").status().ready == 0, "more than the maximum stay")
    with pytest.raises(errors.ResourceExhausted, match="release some"):
        client.pool("py").acquire(wait_s=0.5)
    served: list[int] = []

    def wait(number: int) -> None:
        with Forky(home=forky.home, start=False) as mine, mine.pool("py").acquire(wait_s=120) as machine:
            served.append(number)
            assert sh(machine, "hostname") == machine.name

    waiting = []
    for number in range(3):
        waiting.append(threading.Thread(target=wait, args=(number,)))
        waiting[-1].start()
        eventually(lambda: client.pool("py").status().waiting == len(waiting), "nobody waits")
    for machine in held:
        machine.release()
    for thread in waiting:
        thread.join()
    assert served == [0, 1, 2]
    client.pool("py").scale(target=2, max=6)


def test_a_killed_client_gives_its_place_back_and_its_machine(forky: Instance, client: Forky) -> None:
    client.pool("py").scale(target=1, max=1)
    ready(client, 1)
    held = client.pool("py").acquire()
    waiting = subprocess.Popen(forky.inside(FORKY, "acquire", "py"), env=forky.environment, stdout=subprocess.DEVNULL)
    eventually(lambda: client.pool("py").status().waiting == 1, "it does not wait")
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    eventually(lambda: client.pool("py").status().waiting == 0, "it waits though it is dead")
    held.release()
    assert ready(client, 1).acquired == 0
    client.pool("py").scale(target=2, max=6)


def test_ready_machines_outlive_the_daemons(forky: Instance, client: Forky) -> None:
    ready(client, 2)
    held = client.pool("py").acquire()
    # The next controller knows nothing of the demand: of those above the target the newest stay.
    before = {machine.id for machine in ready(client, 2).machines}
    forky.kill9("controller", "hostd")
    forky.ok("up")
    eventually(forky.hostd_serves, "hostd is not back")
    with Forky(home=forky.home, start=False) as again:
        assert before & {machine.id for machine in again.pool("py").status().machines}
        assert [lease.machine for lease in again.pool("py").status().leases] == [held.id]
        with again.pool("py").acquire() as machine:
            asked = time.time()
            assert asked - 1 < float(sh(machine, _WHO).split()[4]) < time.time() + 1
        again.release(held.id)
    ran = forky.json("run", "--name", "web", "--network", "isolated")
    assert (ran["pool"], ran["network"]["mode"]) == ("py", "isolated")
    assert forky.sh("web", "hostname; cat /etc/hostname") == "web\nweb"
    forky.ok("rm", "web")


@pytest.mark.parametrize("step", mostly_long(ACQUIRE_STEPS, always=("acquire-run",)))
def test_hostd_is_killed_as_it_hands_a_machine_over(forky: Instance, client: Forky, step: str) -> None:
    """Nobody was told of the machine: it goes, and the next caller gets another. One who was told keeps theirs."""
    faulty(forky)
    with Forky(home=forky.home, start=False) as again:
        ready(again, 2)
        (forky.home / "fault").write_text(f"kill {step}")
        got = None
        with contextlib.suppress(errors.HostUnreachable):
            got = again.pool("py").acquire()
        assert got is None or step != "acquire-run"  # the record is written behind the answer, mostly
        eventually(lambda: not (forky.home / "fault").exists(), "hostd lives")
        faulty(forky)
        if got is None:
            got = again.pool("py").acquire(wait_s=60)
            _only_theirs(forky, got.id)
        assert sh(got, "hostname") == got.name
        assert [lease.machine for lease in again.pool("py").status().leases] == [got.id]
        got.release()


def _only_theirs(forky: Instance, acquired: str) -> None:
    """By and by every machine but this one waits in a pool."""

    def are_so() -> bool:
        machines = forky.json("ps", "--all")
        return all(each["pool"] and each["state"] == "paused" for each in machines if each["id"] != acquired)

    eventually(are_so, "what nobody has is there", 60)


def test_a_pool_of_a_snapshot_has_its_state_and_goes_with_all_that_waits(forky: Instance, client: Forky) -> None:
    forky.ok("run", "--name", "box", "--cold-boot")
    forky.sh("box", "echo prepared > /root/state; (sleep 8888 >/dev/null 2>&1 &)")
    forky.ok("snapshot", "box", "--tag", "prepared")
    forky.ok("pool", "create", "of-box", "--from", "prepared", "--target", "1", "--max", "1")
    assert "of-box" in forky.fails("rm", "prepared")
    with Forky(home=forky.home, start=False) as again, again.pool("of-box").acquire(wait_s=120) as machine:
        assert sh(machine, "cat /root/state; cat /proc/[0-9]*/comm | grep -qx sleep && echo runs") == "prepared\nruns"
    for name in ("py", "of-box"):
        forky.ok("pool", "rm", name)
    assert forky.json("pool", "ls") == []
    forky.ok("rm", "box")
    eventually(lambda: not _qemus(forky), "a QEMU is left", 60)
    forky.ok("rm", "prepared")
    assert json.loads(forky.ok("ps", "--all", "--json")) == []


def _qemus(forky: Instance) -> list[int]:
    """Processes of machines: neither frozen ones of snapshots nor shells that stand ready."""
    with Forky(home=forky.home, start=False) as client:
        pids = {machine.info.qemu_pid for machine in client.list()}
    return [pid for pid in pids if pid and os.path.exists(f"/proc/{pid}")]
