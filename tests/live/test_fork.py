"""Forking for real: one instant, N machines, each going its own way."""

import json
import subprocess
import time

from tests.live.conftest import FORKY, Instance

# Holds state in memory and in a file, and goes on counting: what a fork must carry over, to the byte.
COUNTER = """
import os, sys, time, hashlib
secret = os.urandom(32).hex()
open('/root/secret', 'w').write(secret)
n = 0
while True:
    n += 1
    time.sleep(0.02)  # or the machines that write would keep each other from it
    with open('/root/state.new', 'w') as f:
        f.write(f'{secret} {n}')
    os.replace('/root/state.new', '/root/state')
    time.sleep(0.05)
"""


def start_counter(forky: Instance, machine: str) -> None:
    forky.ok("exec", machine, "-i", "--", "sh", "-c", "cat > /root/counter.py", stdin=COUNTER.encode())
    forky.sh(machine, "nohup python3 /root/counter.py >/dev/null 2>&1 & until [ -s /root/state ]; do sleep 0.1; done")


def state(forky: Instance, machine: str) -> tuple[str, int]:
    secret, count = forky.sh(machine, "cat /root/state").split()
    return secret, int(count)


def test_a_running_machine_forks_and_each_goes_its_own_way(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "web")
    start_counter(forky, "web")
    secret, before = state(forky, "web")
    result = forky.json("fork", "web", "-n", "3")
    assert set(result) >= {"snapshot", "parent", "pause_ms", "children"}
    assert result["pause_ms"] > 0
    names = [child["name"] for child in result["children"]]
    assert names == ["web-1", "web-2", "web-3"]
    for name in ["web", *names]:
        inherited, count = state(forky, name)
        assert inherited == secret  # memory and files of the same instant
        assert count >= before
    for name in ["web", *names]:
        forky.sh(name, f"echo {name} > /root/mine")
    time.sleep(0.3)
    assert [forky.sh(name, "cat /root/mine") for name in ["web", *names]] == ["web", *names]
    moved = [state(forky, name)[1] for name in ["web", *names]]
    time.sleep(1)
    assert all(state(forky, name)[1] > was for name, was in zip(["web", *names], moved, strict=True))


def test_children_are_machines_of_their_own(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "a")
    names = [c["name"] for c in forky.json("fork", "a", "-n", "3")["children"]]
    everyone = ["a", *names]
    assert [forky.sh(name, "hostname") for name in names] == names
    for command in (
        "head -c 16 /dev/urandom | od -An -tx1",
        "cat /etc/machine-id",
        "python3 -c 'import os; print(os.getrandom(16).hex())'",
    ):
        answers = [forky.sh(name, command) for name in everyone]
        assert len(set(answers)) == len(everyone), (command, answers)
    for name in everyone:
        assert abs(float(forky.sh(name, "date +%s.%N")) - time.time()) < 5


def test_generations(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "g0")
    forky.sh("g0", "echo 0 > /root/line")
    name = "g0"
    for generation in range(1, 5):
        child = forky.json("fork", name, "-n", "1", "--name", f"g{generation}")["children"][0]
        name = child["name"]
        forky.sh(name, f"echo {generation} >> /root/line; head -c 5M /dev/urandom > /root/blob{generation}; sync")
    assert forky.sh(name, "cat /root/line").split() == ["0", "1", "2", "3", "4"]
    assert forky.sh("g0", "cat /root/line") == "0"
    again = forky.json("fork", "g0", "-n", "1", "--name", "other")["children"][0]["name"]
    assert forky.sh(again, "cat /root/line") == "0"


def test_cold_fork_of_a_paused_machine(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "p")
    forky.sh("p", "echo here > /root/file")
    forky.ok("pause", "p")
    result = forky.json("fork", "p", "-n", "2")
    assert result["pause_ms"] == 0
    assert forky.json("inspect", "p")["state"] == "paused"
    assert [forky.sh(c["name"], "cat /root/file") for c in result["children"]] == ["here", "here"]
    forky.ok("resume", "p")
    assert forky.sh("p", "cat /root/file") == "here"


def test_snapshots_are_forked_later(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "s")
    forky.sh("s", "echo one > /root/file")
    snapshot = forky.json("snapshot", "s", "--tag", "one")
    forky.sh("s", "echo two > /root/file")
    result = forky.json("fork", "one", "-n", "2", "--name", "back")
    assert result["snapshot"] == snapshot["id"]
    assert [forky.sh(c["name"], "cat /root/file") for c in result["children"]] == ["one", "one"]
    assert forky.sh("s", "cat /root/file") == "two"
    assert "one" in forky.ok("snapshots")
    tree = forky.ok("tree")
    assert "back-1" in tree
    assert "s" in tree
    assert "stand on it" in forky.fails("rm", "one")
    forky.ok("rm", "back-1", "back-2", "s")
    forky.ok("rm", "one")


def test_paused_children(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "q")
    child = forky.json("fork", "q", "--paused")["children"][0]
    assert forky.json("inspect", child["name"])["state"] == "paused"
    forky.ok("resume", child["name"])
    assert forky.sh(child["name"], "hostname") == child["name"]


def test_an_open_exec_goes_on_over_a_fork(clean: Instance) -> None:
    """Output of a command in the parent is neither lost nor doubled by the forks that happen meanwhile."""
    forky = clean
    forky.ok("run", "--name", "x")
    script = "import sys, time\nfor i in range(3000):\n print(i, flush=True)\n time.sleep(0.001)"
    reader = subprocess.Popen(
        [FORKY, "exec", "x", "--", "python3", "-c", script],
        env=forky.environment,
        stdout=subprocess.PIPE,
    )
    time.sleep(1.5)
    for _ in range(3):
        forky.json("fork", "x", "-n", "1")
    out, _ = reader.communicate(timeout=120)
    assert reader.returncode == 0
    assert [int(line) for line in out.split()] == list(range(3000))


def test_memory_and_disk_are_right_under_load_over_generations(clean: Instance) -> None:
    """Writers go on while forks happen; every record that says it was written is whole, in every machine."""
    forky = clean
    writer = """
import hashlib, os, time
kept = {}
os.makedirs('/root/d', exist_ok=True)
n = 0
while True:
    time.sleep(0.05)  # four machines that never rest would take both cores from all that runs beside this
    n += 1
    data = os.urandom(200_000)
    name = f'/root/d/{n % 40}'
    with open(name + '.new', 'wb') as f:
        f.write(hashlib.sha256(data).digest() + data)
    os.replace(name + '.new', name)
    kept[n % 40] = data
    if n % 10 == 0:
        bad = [k for k, v in kept.items() if open(f'/root/d/{k}', 'rb').read()[32:] != v]
        open('/root/report', 'a').write(f'{n} {bad}\\n')
"""
    check = (
        "import glob, hashlib\n"
        "for name in glob.glob('/root/d/*'):\n"
        "    if not name.endswith('.new'):\n"
        "        b = open(name, 'rb').read()\n"
        "        assert hashlib.sha256(b[32:]).digest() == b[:32], name\n"
        "lines = open('/root/report').read().splitlines()\n"
        "assert lines and all(line.endswith('[]') for line in lines), lines[-3:]\n"
        "print(len(lines))"
    )
    forky.ok("run", "--name", "w")
    forky.ok("exec", "w", "-i", "--", "sh", "-c", "cat > /root/w.py", stdin=writer.encode())
    forky.ok("exec", "w", "-i", "--", "sh", "-c", "cat > /root/check.py", stdin=check.encode())
    forky.sh("w", "nohup python3 /root/w.py > /root/err 2>&1 & until [ -s /root/report ]; do sleep 0.1; done")
    machines = ["w"]
    for _ in range(3):
        parent = machines[-1]
        machines.append(forky.json("fork", parent, "-n", "1")["children"][0]["name"])
        time.sleep(1.5)
    for name in machines:
        reports = int(forky.sh(name, "python3 /root/check.py"))
        assert reports > 0
        assert forky.sh(name, "cat /root/err") == ""
        was = reports
        time.sleep(1.5)
        assert int(forky.sh(name, "python3 /root/check.py")) > was  # the writer goes on
        forky.ok("pause", name)


def test_ps_has_the_promised_fields(clean: Instance) -> None:
    forky = clean
    forky.ok("run", "--name", "f")
    (machine,) = json.loads(forky.ok("ps", "--json"))
    assert set(machine) >= {
        "id", "name", "state", "snapshot", "image", "cpus", "memory_mib", "qemu_pid", "address"
    }  # fmt: skip
    assert machine["name"] == "f"
    assert machine["state"] == "running"
