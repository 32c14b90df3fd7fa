"""Networks as they are set up: too small, clashing, and QEMU's user-mode network with what it can and can't do."""

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.live.conftest import Instance, ip, new_instance

ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", 8800), timeout=10) as s:
    print(s.makefile().readline().strip())
"""
GREET = """
import socket
listener = socket.create_server(("0.0.0.0", 80))
open("/run/up", "w")
while True:
    with listener.accept()[0] as s:
        s.sendall(socket.gethostname().encode() + b"\\n")
"""


@pytest.fixture
def instance(request: pytest.FixtureRequest) -> Iterator[Instance]:
    """One with the settings of the test's parameter."""
    made = new_instance(**request.param)
    try:
        yield made
    finally:
        made.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(made.home)], check=False)


def greeting(forky: Instance) -> str:
    """What answers on the published port, asked from the host; it may take a moment to be there again."""
    for _ in range(20):
        done = subprocess.run(forky.inside("python3", "-c", ASK), capture_output=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.decode().strip()
        time.sleep(0.2)
    raise AssertionError(done.stderr.decode())


@pytest.mark.parametrize("instance", [{"FORKY_SUBNET": "10.99.0.0/28"}], indirect=True)
def test_more_children_than_addresses(instance: Instance) -> None:
    """Nothing is begun, nothing is left, and what was there goes on."""
    forky = instance
    address = forky.json("run", "--name", "web")["address"]
    assert address.startswith("10.99.0.")
    error = forky.fails("fork", "web", "-n", "50")
    assert "50" in error and "FORKY_SUBNET" in error
    assert [m["name"] for m in forky.json("ps")] == ["web"]
    assert forky.json("snapshots") == [s for s in forky.json("snapshots") if s["kind"] == "template"]
    assert len(forky.json("fork", "web", "-n", "2")["children"]) == 2
    assert forky.sh("web", "echo alive") == "alive"


@pytest.mark.long
@pytest.mark.parametrize("instance", [{"FORKY_SUBNET": "198.18.4.0/24"}], indirect=True)
def test_a_subnet_that_the_host_has(instance: Instance) -> None:
    ip("-n", instance.netns, "link", "add", "lan", "type", "bridge")
    ip("-n", instance.netns, "address", "add", "198.18.4.9/24", "dev", "lan")
    ip("-n", instance.netns, "link", "set", "lan", "up")
    error = instance.fails("up")
    assert "198.18.4.0/24" in error and "FORKY_SUBNET" in error


@pytest.mark.parametrize("instance", [{"FORKY_NETWORK": "user"}], indirect=True)
def test_user_mode(instance: Instance) -> None:
    forky = instance
    forky.ok("up")
    assert forky.json("status")["network"] == "user"
    made = forky.json("run", "--name", "web", "-p", "127.0.0.1:8800:80")
    assert made["address"] is None
    forky.ok("exec", "web", "-i", "--", "sh", "-c", "cat > /root/greet.py", stdin=GREET.encode())
    forky.sh("web", "nohup python3 /root/greet.py >/dev/null 2>&1 & until [ -e /run/up ]; do sleep 0.1; done")
    assert greeting(forky) == "web"
    forky.ok("fork", "web", "-n", "1")
    assert greeting(forky) == "web", "the port stays the parent's"
    assert "8800" in forky.fails("run", "--name", "other", "-p", "127.0.0.1:8800:80")
    for option in (("--egress", "deny"), ("--network", "isolated"), ("--bandwidth", "1M")):
        assert "user network" in forky.fails("update", "web", *option)
    forky.ok("update", "web", "--unpublish", "127.0.0.1:8800")
    assert subprocess.run(forky.inside("python3", "-c", ASK), capture_output=True, check=False).returncode != 0
