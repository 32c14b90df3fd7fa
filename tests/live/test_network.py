"""Machines in a network of their own: addresses, names, ports, policies, and connections over a fork."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.live.conftest import Instance, ip, new_instance

OUTSIDE = "198.18.0.1"  # RFC 2544: for tests
METADATA = "169.254.169.254"


@pytest.fixture(scope="module")
def forky() -> Iterator[Instance]:
    """An instance whose host has an outside: a namespace behind a cable, which the default route leads to."""
    instance = new_instance()
    outside = f"{instance.netns}-out"
    try:
        ip("netns", "add", outside)
        ip("-n", instance.netns, "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", outside)
        for netns, address in ((instance.netns, "198.18.0.2/24"), (outside, f"{OUTSIDE}/24")):
            ip("-n", netns, "address", "add", address, "dev", "wan")
            ip("-n", netns, "link", "set", "wan", "up")
        ip("-n", outside, "address", "add", f"{METADATA}/32", "dev", "wan")
        ip("-n", outside, "link", "set", "lo", "up")
        ip("-n", instance.netns, "route", "add", "default", "via", OUTSIDE)
        yield instance
    finally:
        try:
            instance.end()
        finally:
            subprocess.run(["ip", "netns", "delete", outside], check=False)
            subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


SERVER = """
import socketserver, sys
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write((self.client_address[0] + " " + line.decode()).encode()); self.wfile.flush()
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
Server(("0.0.0.0", int(sys.argv[1])), Echo).serve_forever()
"""


@pytest.fixture(scope="module")
def server(forky: Instance) -> Iterator[int]:
    """A server outside, and the same one in the machine «web»; the port."""
    outside = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{forky.netns}-out", "python3", "-c", SERVER, "7000"],
    )
    try:
        forky.ok("run", "--name", "web")
        serve(forky, "web")
        yield 7000
    finally:
        outside.kill()
        outside.wait()


def serve(forky: Instance, machine: str) -> None:
    forky.sh(machine, f"cat > /root/server.py <<'END'\n{SERVER}\nEND\npython3 /root/server.py 7000 >/dev/null 2>&1 &")
    wait_for(lambda: forky.sh(machine, "grep -c ':1B58 ' /proc/net/tcp || true") != "0")


def wait_for(condition: object, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def address(forky: Instance, machine: str) -> str:
    return str(forky.json("inspect", machine)["address"])


ASK = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as s:
        s.sendall(b"hi\\n"); print("said", s.makefile().readline().strip())
except OSError as error:
    print(type(error).__name__)
"""


def ask(forky: Instance, machine: str, where: str, port: int = 7000) -> str:
    """What a machine hears from a server: "said ADDRESS hi", or the name of the error."""
    return forky.sh(machine, f"python3 -c '{ASK}' {where} {port}")


def ask_from_host(forky: Instance, where: str, port: int = 7000) -> str:
    done = subprocess.run(forky.inside("python3", "-c", ASK, where, str(port)), capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_every_machine_has_an_address_of_its_own_and_the_same_one_inside(forky: Instance, server: int) -> None:
    forky.ok("fork", "web", "-n", "2")
    addresses = {m["name"]: m["address"] for m in forky.json("ps")}
    assert len(set(addresses.values())) == 3
    for machine, where in addresses.items():
        assert forky.sh(machine, "ip -4 -o address show eth0 | grep -o '10.0.2.15/24'") == "10.0.2.15/24"
        assert ask_from_host(forky, where).startswith("said"), machine
    # Each is the one that it says: the server in each answers under the name of its own machine.
    assert ask(forky, "web-1", addresses["web-2"]) == f"said {addresses['web-1']} hi"
    assert ask(forky, "web", addresses["web-1"]) == f"said {addresses['web']} hi"


def test_machines_know_each_other_by_name(forky: Instance, server: int) -> None:
    web = address(forky, "web")
    child = forky.json("fork", "web", "--name", "named")["children"][0]["name"]
    assert forky.sh(child, "getent ahostsv4 web.forky | head -1 | cut -d' ' -f1") == web
    assert forky.sh("web", f"getent ahostsv4 {child}.forky | head -1 | cut -d' ' -f1") == address(forky, child)
    assert forky.sh(child, "getent hosts nobody.forky || echo none") == "none"
    assert ask(forky, child, "web.forky").startswith("said")


def test_the_outside_sees_the_host(forky: Instance, server: int) -> None:
    assert ask(forky, "web", OUTSIDE) == "said 198.18.0.2 hi"


def test_policies_hold_and_can_be_changed_while_the_machine_runs(forky: Instance, server: int) -> None:
    made = forky.json("run", "--name", "shy", "--egress", "deny")
    web = address(forky, "web")
    assert made["network"]["egress"] == "deny"
    assert ask(forky, "shy", OUTSIDE) != "said 198.18.0.2 hi"
    assert not ask(forky, "shy", web).startswith("said")
    forky.ok("update", "shy", "--egress", "198.18.0.1/32")
    assert ask(forky, "shy", OUTSIDE) == "said 198.18.0.2 hi"
    assert not ask(forky, "shy", web).startswith("said")
    forky.ok("update", "shy", "--egress", "allow", "--network", "isolated")
    assert not ask(forky, "shy", OUTSIDE).startswith("said")
    assert ask(forky, "shy", web).startswith("said")
    forky.ok("update", "shy", "--network", "none")
    assert not ask(forky, "shy", web).startswith("said")
    forky.ok("update", "shy", "--network", "nat")
    assert ask(forky, "shy", OUTSIDE).startswith("said")
    child = forky.json("update", "shy", "--egress", "deny") and forky.json("fork", "shy")["children"][0]["name"]
    assert not ask(forky, child, OUTSIDE).startswith("said"), "a child has its parent's policy"


def test_metadata_and_the_hosts_own_services_are_closed(forky: Instance, server: int) -> None:
    host = subprocess.Popen(forky.inside("python3", "-c", SERVER, "7000"))
    try:
        wait_for(lambda: ask_from_host(forky, "127.0.0.1").startswith("said"))
        gateway = forky.sh("web", "ip route show default | cut -d' ' -f3")
        for where in (METADATA, "198.18.0.2", gateway):
            assert not ask(forky, "web", where).startswith("said"), where
    finally:
        host.kill()
        host.wait()


def test_published_ports(forky: Instance, server: int) -> None:
    forky.ok("update", "web", "-p", "8700:7000")
    listed = forky.json("port", "web")
    assert [(p["host_port"], p["guest_port"], p["protocol"]) for p in listed] == [(8700, 7000, "tcp")]
    assert ask_from_host(forky, "127.0.0.1", 8700).startswith("said")
    assert ask_from_host(forky, "198.18.0.2", 8700).startswith("said")
    outside = subprocess.run(
        ["nsenter", f"--net=/run/netns/{forky.netns}-out", "python3", "-c", ASK, "198.18.0.2", "8700"],
        capture_output=True,
        check=True,
    )
    assert outside.stdout.decode().strip() == "said 198.18.0.1 hi"
    assert "8700" in forky.fails("run", "--name", "second", "-p", "8700:80")
    assert "second" not in [m["name"] for m in forky.json("ps")]
    taken = subprocess.Popen(forky.inside("python3", "-c", SERVER, "8701"))
    try:
        wait_for(lambda: ask_from_host(forky, "127.0.0.1", 8701).startswith("said"))
        assert "8701" in forky.fails("update", "web", "-p", "8701:7000")
    finally:
        taken.kill()
        taken.wait()
    assert forky.json("fork", "web", "--name", "unpublished") and forky.json("port", "unpublished-1") == []
    forky.ok("update", "web", "--unpublish", "8700")
    assert not ask_from_host(forky, "127.0.0.1", 8700).startswith("said")


LOOP = """
import json, socket, sys, time
slowest, count = 0.0, 0
with socket.create_connection((sys.argv[1], 7000), timeout=20) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = s.makefile()
    print("open", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        began = time.monotonic()
        s.sendall(b"%d\\n" % count)
        assert lines.readline().split()[1] == str(count)
        slowest = max(slowest, time.monotonic() - began)
        count += 1
        time.sleep(0.01)
    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
print(json.dumps({"count": count, "slowest_ms": slowest * 1000, "retransmits": info[2]}))
"""


def test_an_open_connection_to_the_parent_survives_its_forks(forky: Instance, server: int) -> None:
    loop = subprocess.Popen(
        forky.inside("python3", "-c", LOOP, address(forky, "web"), "12"), stdout=subprocess.PIPE, text=True
    )
    assert loop.stdout is not None
    assert loop.stdout.readline() == "open\n"
    for generation in (1, 2):
        forky.ok("fork", "web", "-n", "1", "--name", f"gen{generation}")
    out, _ = loop.communicate(timeout=60)
    assert loop.returncode == 0, "the connection was reset or an answer was wrong"
    assert json.loads(out)["count"] > 100


INHERITED = """
import socket, time
s = socket.create_connection(("198.18.0.1", 7000))
s.sendall(b"before\\n"); f = s.makefile(); f.readline()
open("/root/open", "w").close()
try:
    line = f.readline()
    open("/root/end", "w").write("closed" if not line else "data")
except OSError as error:
    open("/root/end", "w").write(type(error).__name__)
"""


DATAGRAMS = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE: what waits in here is not lost by a fork
s.bind(("0.0.0.0", 7001))
open("/run/datagrams", "w")
while True:
    data, peer = s.recvfrom(100)
    s.sendto(data, peer)
"""

# A datagram every 2 ms until a line comes on stdin; prints which ones had no answer 3 s later.
ASK_DATAGRAMS = """
import socket, sys, threading, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE: what waits in here is not lost by a fork
s.connect((sys.argv[1], 7001))
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
answered = set()
def listen():
    while True:
        answered.add(int(s.recv(100)))
threading.Thread(target=listen, daemon=True).start()
sent = 0
while not ended.is_set():
    s.send(b"%d" % sent)
    sent += 1
    if sent == 1:
        print("begun", flush=True)
    time.sleep(0.002)
time.sleep(3)
print(sent, sorted(set(range(sent)) - answered), flush=True)
"""


def test_no_packet_of_a_fork_is_lost(forky: Instance, server: int) -> None:
    """TCP would send again what is lost, 200 ms later: so here nothing does."""
    forky.sh("web", f"cat > /root/datagrams.py <<'EOF'\n{DATAGRAMS}\nEOF\n")
    forky.sh("web", "setsid python3 /root/datagrams.py </dev/null >/dev/null 2>&1 &")
    forky.sh("web", "until [ -e /run/datagrams ]; do sleep 0.1; done")
    client = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{forky.netns}", "python3", "-c", ASK_DATAGRAMS, address(forky, "web")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        for _ in range(3):
            time.sleep(0.5)
            forky.ok("rm", *(child["name"] for child in forky.json("fork", "web", "-n", "1")["children"]))
        out, _ = client.communicate("\n", timeout=60)
    finally:
        client.kill()
    sent, _, lost = out.partition(" ")
    assert int(sent) > 500
    assert lost.strip() == "[]", f"of {sent} datagrams these were lost: {lost}"


@pytest.mark.parametrize("mode", ["reset", "silent"])
def test_inherited_connections(forky: Instance, server: int, mode: str) -> None:
    """A program in a child that waits on its parent's connection hears of its end at once, or never."""
    forky.ok("run", "--name", f"tcp-{mode}")
    machine = f"tcp-{mode}"
    forky.sh(machine, f"cat > /root/held.py <<'END'\n{INHERITED}\nEND\npython3 /root/held.py >/dev/null 2>&1 &")
    wait_for(lambda: forky.sh(machine, "ls /root/open 2>/dev/null || true") != "")
    child = forky.json("fork", machine, "--tcp", mode)["children"][0]["name"]
    if mode == "reset":
        wait_for(lambda: forky.sh(child, "cat /root/end 2>/dev/null || true") != "", 10.0)
        assert "Error" in forky.sh(child, "cat /root/end")
    else:
        time.sleep(2.0)
        assert forky.sh(child, "cat /root/end 2>/dev/null || echo waits") == "waits"
    assert forky.sh(machine, "cat /root/end 2>/dev/null || echo waits") == "waits", "the parent's own goes on"


def test_a_namespace_removed_from_under_a_machine(forky: Instance, server: int) -> None:
    forky.ok("run", "--name", "poor")
    where = address(forky, "poor")
    slot = next(
        p for p in ip("netns", "list").split() if p.startswith(f"forky-{forky.name}-") and has_address(p, where)
    )
    ip("netns", "delete", slot)
    error = forky.fails("fork", "poor")
    assert "namespace" in error or "network" in error
    assert forky.sh("poor", "echo alive") == "alive"
    assert ask(forky, "web", OUTSIDE).startswith("said"), "others notice nothing"
    forky.ok("stop", "poor")
    forky.ok("start", "poor")
    assert ask(forky, "poor", OUTSIDE).startswith("said")
    forky.ok("rm", "poor")


def has_address(slot: str, wanted: str) -> bool:
    return wanted in ip("-n", slot, "-4", "address")


def test_daemons_die_and_connections_go_on(forky: Instance, server: int) -> None:
    loop = subprocess.Popen(
        forky.inside("python3", "-c", LOOP, address(forky, "web"), "15"), stdout=subprocess.PIPE, text=True
    )
    assert loop.stdout is not None
    assert loop.stdout.readline() == "open\n"
    forky.ok("update", "web", "-p", "8702:7000")
    was = address(forky, "web")
    forky.kill9("hostd", "controller")
    assert ask_from_host(forky, "127.0.0.1", 8702).startswith("said"), "ports stay published"
    forky.ok("up")
    assert address(forky, "web") == was
    forky.ok("fork", "web", "--name", "after")
    out, _ = loop.communicate(timeout=60)
    assert loop.returncode == 0
    assert json.loads(out)["count"] > 100
    forky.ok("update", "web", "--unpublish", "8702")


def test_bad_networks(forky: Instance, server: int) -> None:
    assert "nat" in forky.fails("run", "--network", "bridge", code=2)
    assert "10.0.0.0/8" in forky.fails("run", "--egress", "nowhere", code=2)
    assert "HOST:GUEST" in forky.fails("run", "-p", "80", code=2)
    assert socket.inet_aton(address(forky, "web"))
