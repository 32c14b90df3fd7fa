"""Two tenants on one host: names, networks, shared snapshots, KSM, with real machines."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from forkypig.sync import Forky as Sdk
from tests.live.conftest import Instance

_KSM = Path("/sys/kernel/mm/ksm/run")


class Tenant:
    """The operator's `forky` in a tenant."""

    def __init__(self, forky: Instance, name: str) -> None:
        self._forky, self.name = forky, name

    def ok(self, *arguments: str) -> str:
        return self._forky.ok("--tenant", self.name, *arguments)

    def json(self, *arguments: str) -> Any:
        return self._forky.json("--tenant", self.name, *arguments)

    def fails(self, *arguments: str) -> str:
        return self._forky.fails("--tenant", self.name, *arguments)

    def exec(self, machine: str, *argv: str) -> str:
        """By the SDK: a process less than by the command line."""
        with mock.patch.dict(os.environ, FORKY_TENANT=self.name), Sdk(home=self._forky.home, start=False) as forky:
            done = forky.get(machine).exec(list(argv))
        assert done.exit_code == 0, done
        return done.stdout.decode().strip()

    def sh(self, machine: str, script: str) -> str:
        return self.exec(machine, "sh", "-c", script)

    def address(self, machine: str) -> str:
        with mock.patch.dict(os.environ, FORKY_TENANT=self.name), Sdk(home=self._forky.home, start=False) as forky:
            return str(forky.get(machine).info.address)

    def connects(self, machine: str, address: str) -> str:
        """What becomes of a connection to a port on which nobody listens: a machine that is reached refuses it."""
        code = (
            "import socket\n"
            "try: socket.create_connection(('%s', 9), 2)\n"
            "except ConnectionRefusedError: print('refused')\n"
            "except OSError: print('nothing')"
        )
        return self.exec(machine, "python3", "-c", code % address)

    def resolves(self, machine: str, name: str) -> str:
        return self.sh(machine, f"getent ahostsv4 {name}.forky | head -1 | cut -d' ' -f1")


@pytest.fixture(scope="module")
def town(forky: Instance) -> Iterator[tuple[Tenant, Tenant]]:
    """Tenant red with web and other, blue with web."""
    made = tuple(Tenant(forky, name) for name in ("red", "blue"))
    for tenant in made:
        forky.ok("tenant", "create", tenant.name)
        tenant.ok("run", "--name", "web", "--memory", "256M")
    red, blue = made
    red.ok("run", "--name", "other", "--memory", "256M")
    try:
        yield red, blue
    finally:
        for tenant in (blue, red):
            tenant.ok("rm", "--all")
            for snapshot in tenant.json("snapshots"):
                if snapshot["tenant"] == tenant.name and snapshot["kind"] == "kept":
                    tenant.ok("rm", snapshot["id"])
            _until(lambda tenant=tenant: not tenant.json("snapshots"), True)
            forky.ok("tenant", "rm", tenant.name)


def _until(state: Callable[[], Any], expected: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while (now := state()) != expected:
        assert time.monotonic() < deadline, now
        time.sleep(0.2)


def _apart(red: Tenant, blue: Tenant) -> None:
    there, other = red.address("web"), red.address("other")
    assert red.connects("other", there) == "refused"
    assert red.resolves("web", "other") == other
    assert blue.connects("web", there) == "nothing"
    assert red.connects("other", blue.address("web")) == "nothing"
    assert blue.resolves("web", "other") == ""
    assert blue.resolves("web", "web") == blue.address("web")


def test_machines_of_two_tenants_are_apart(forky: Instance, town: tuple[Tenant, Tenant]) -> None:
    red, blue = town
    assert [m["name"] for m in forky.json("ps")] == []
    assert "there is no machine or snapshot «other»" in blue.fails("inspect", "other")
    _apart(red, blue)
    forky.kill9("hostd")
    forky.ok("up")
    _apart(red, blue)


def test_a_shared_snapshot_begins_anew_in_another_tenant(town: tuple[Tenant, Tenant]) -> None:
    red, blue = town
    red.sh("web", "echo shared > /root/file")
    red.ok("snapshot", "web", "--tag", "base")
    assert "there is no machine or snapshot «base»" in blue.fails("fork", "base")
    red.ok("share", "base", "--with", "blue")
    blue.ok("fork", "base", "--name", "mine")
    assert blue.sh("mine-1", "cat /root/file; hostname") == "shared\nmine-1"
    assert blue.connects("mine-1", red.address("web")) == "nothing"
    assert blue.connects("mine-1", blue.address("web")) == "refused"
    assert blue.json("inspect", "mine-1")["parent"] is None
    red.ok("unshare", "base", "--with", "blue")
    assert "1 thing of other tenants" in red.fails("rm", "base")


@pytest.mark.skipif(not _KSM.exists(), reason="this kernel has no KSM")
def test_ksm_merges_what_one_tenants_machines_wrote(forky: Instance, town: tuple[Tenant, Tenant]) -> None:
    red, blue = town
    before = _KSM.read_text()
    write = "import random; open('/dev/shm/same', 'wb').write(random.Random(7).randbytes(32 << 20))"
    for tenant, machine in ((red, "web"), (red, "other"), (blue, "web")):
        tenant.exec(machine, "python3", "-c", write)
    assert red.json("ksm", "on")["tenants"] == ["red"]
    assert "CVE-2015-2877" in blue.fails("ksm", "on")

    def merged_mib() -> int:
        return int(forky.json("ksm", "status")["merged_bytes"]) >> 20

    _until(lambda: merged_mib() >= 64, True, 120)
    print(forky.ok("ksm", "status"))
    assert red.json("ksm", "off")["tenants"] == []
    assert merged_mib() == 0
    assert _KSM.read_text() == before
