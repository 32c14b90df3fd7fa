"""A hundred children of one busy machine, or as many as this host has room for: every row of
docs/fork-correctness.md holds in each of them. FORKY_TEST_CHILDREN=100 asks for all of them on any host."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forkypig.sync import Forky
from tests.live.conftest import Instance

CHILD_MIB = 50  # of host memory, with room to spare (bench/results has what it is)

# A program under load: it holds the same number in memory and, fsynced, on disk, and compares them past the page cache;
# it draws random numbers, watches the monotonic clock, keeps a connection, and says how it is ten times a second.
WITNESS = """
import json, mmap, os, random, signal, socket, sys, threading, time

state = {"n": 0, "torn": 0, "back": 0, "random": "", "urandom": "", "tcp": "open", "forked": False, "rest": 0,
         "secret": True}

def reseed(*_):
    random.seed(os.urandom(32))
    state["random"], state["forked"] = "%016x" % random.getrandbits(64), True

signal.signal(signal.SIGUSR2, reseed)
open("/run/forky/notify/%d" % os.getpid(), "w").write("SIGUSR2")

def count():
    path = "/root/count"
    open(path, "wb").write(b"0".zfill(4096))
    write, read = os.open(path, os.O_WRONLY | os.O_DSYNC), os.open(path, os.O_RDONLY | os.O_DIRECT)
    page, rest = mmap.mmap(-1, 4096), 0
    while True:
        os.preadv(read, [page], 0)
        if int(page[:]) != state["n"]:
            state["torn"] += 1
        n = state["n"] + 1
        os.pwrite(write, b"%04096d" % n, 0)
        state["n"] = n
        if state["forked"]:  # a hundred of them share this host's cores: five times more, and it rests
            rest += 1
            time.sleep(0.1 if rest < 5 else 3600)

def hold():
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    open("/run/connected", "w").close()
    try:
        state["tcp"] = "closed" if not connection.recv(1) else "data"
    except OSError as error:
        state["tcp"] = type(error).__name__

for work in (count, hold):
    threading.Thread(target=work, daemon=True).start()
last = time.monotonic()
while True:
    now = time.monotonic()
    state["back"] += now < last
    last = now
    open("/run/witness.new", "w").write(json.dumps(state) + "\\n")
    os.rename("/run/witness.new", "/run/witness.json")
    state["urandom"] = os.urandom(16).hex()
    state["secret"] = b"hunter2" in open("/proc/self/environ", "rb").read()
    time.sleep(0.1 if not state["forked"] else 3600 if state["rest"] > 8 else 0.1)
    state["rest"] += state["forked"]
"""

PEER = """
import socket, time
listener = socket.create_server(("0.0.0.0", 9))
open("/run/up", "w")
kept = listener.accept()
time.sleep(9999)
"""

# Few processes: each is translated anew in every child.
LOOK = (
    "cat /run/witness.json /proc/sys/kernel/hostname /etc/machine-id /proc/sys/kernel/random/boot_id "
    "/run/forky/generation; date +%s.%N"
)


def how_many() -> int:
    """Children that this host has room for, at most a hundred. An emulated one takes a core for half a second."""
    if wanted := os.environ.get("FORKY_TEST_CHILDREN"):
        return int(wanted)
    available = next(
        int(line.split()[1]) >> 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return max(4, min(100, (available - 1024) // CHILD_MIB, 25 * (os.cpu_count() or 1)))


def test_every_child_of_a_hundred_is_a_machine_of_its_own(forky: Instance) -> None:
    count = how_many()
    forky.ok("run", "--name", "peer")
    peer = forky.json("inspect", "peer")["address"]
    forky.ok("exec", "peer", "-i", "--", "sh", "-c", "cat > /root/peer.py", stdin=PEER.encode())
    forky.sh("peer", "nohup python3 /root/peer.py >/dev/null 2>&1 & until [ -e /run/up ]; do sleep 0.1; done")
    forky.ok("run", "--name", "origin", "--cpu-limit", "1.5")
    forky.ok("exec", "origin", "-i", "--", "sh", "-c", "cat > /root/witness.py", stdin=WITNESS.encode())
    forky.sh(
        "origin",
        f"TOKEN=hunter2 nohup python3 /root/witness.py {peer} 9 >/root/out 2>&1 & "
        "for i in $(seq 300); do [ -e /run/connected ] && grep -q n /run/witness.json && break; sleep 0.1; done; "
        "[ -e /run/connected ]",
    )
    made = forky.json("fork", "origin", "-n", str(count), "--name", "c", "--forget", "TOKEN", timeout_s=580)
    print(f"{count} children")
    assert len(made["children"]) == count

    machines = {m["name"]: m for m in forky.json("ps")}
    seen: dict[str, list[str]] = {}
    with Forky(home=forky.home, start=False) as client, ThreadPoolExecutor(4) as pool:

        def look(name: str) -> tuple[str, float, list[str], float]:
            began = time.time()
            done = client.get(name).exec(["sh", "-c", LOOK])
            return name, began, done.stdout.decode().splitlines(), time.time()

        looks = list(pool.map(look, [child["name"] for child in made["children"]]))
    for name, began, (witness, hostname, *names, clock), ended in looks:
        state = json.loads(witness)
        machine = machines[name]
        seen[name] = [state["random"], state["urandom"], machine["address"], machine["id"], *names]
        # memory and disk are of one instant, and the program goes on
        assert state["torn"] == 0, (name, state)
        assert state["n"] > 0, (name, state)
        # it heard of the fork, and of the end of its connection; its clock never went back
        assert state["forked"], (name, state)
        assert state["tcp"] == "ConnectionAbortedError", (name, state)
        assert state["back"] == 0, (name, state)
        assert not state["secret"], (name, state)
        assert hostname == name
        assert began - 0.05 <= float(clock) <= ended + 0.05, (name, began, clock, ended)
        # limits: a cgroup of its own
        groups = Path(f"/proc/{machine['qemu_pid']}/cgroup").read_text()
        assert machine["id"] in groups or not forky.cgroups(), (name, groups)
        assert machine["limits"]["cpus"] == 1.5
    # random numbers, address, machine-id, boot-id, generation: no two have one in common
    for column in zip(*seen.values(), strict=True):
        assert len(set(column)) == count, column
    # the parent noticed nothing
    state = json.loads(forky.sh("origin", "cat /run/witness.json"))
    assert (state["torn"], state["back"], state["tcp"], state["forked"]) == (0, 0, "open", False), state
    assert state["secret"], state
    forky.ok("rm", "--all")  # without the shutdown that `down` would give each
