"""A Forky Pig of its own, driven by the command line; at the end nothing may be left of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forkypig.daemon.settings import Settings
from forkypig.hostd.network import instance_of
from forkypig.sync import Forky

CHECKOUT = Path(__file__).parents[2]
FORKY = str(Path(sys.executable).with_name("forky"))
IMAGES = Path(os.environ.get("FORKY_TEST_IMAGES") or CHECKOUT / ".cache/images")


class Instance:
    """One FORKY_HOME and its `forky` command, in a network namespace that stands for the host's."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        self.name = instance_of(Settings(home=home))
        self.netns = f"fpt-{self.name}"
        ip("netns", "add", self.netns)
        ip("-n", self.netns, "link", "set", "lo", "up")
        self.environment = {**os.environ, "FORKY_HOME": str(home), "FORKY_PACK_AFTER_S": "3600", **settings}

    def inside(self, *argv: str) -> list[str]:
        """The command, in the namespace that stands for the host's. Not `ip netns exec`, which hides the cgroups."""
        return ["nsenter", f"--net=/run/netns/{self.netns}", *argv]

    def run(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 240) -> subprocess.CompletedProcess[bytes]:
        """Runs `forky ARGUMENTS`."""
        return subprocess.run(
            self.inside(FORKY, *arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def ok(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 240) -> str:
        """Runs a command that must succeed; its stdout."""
        done = self.run(*arguments, stdin=stdin, timeout_s=timeout_s)
        assert done.returncode == 0, f"forky {' '.join(arguments)}: {done.returncode}\n{self.explain(done)}"
        return done.stdout.decode()

    def json(self, *arguments: str, timeout_s: float = 240) -> Any:
        """Runs a command with --json."""
        return json.loads(self.ok(*arguments, "--json", timeout_s=timeout_s))

    def fails(self, *arguments: str, code: int = 1) -> str:
        """Runs a command that must fail with `code`; its one sentence on stderr."""
        done = self.run(*arguments)
        assert done.returncode == code, self.explain(done)
        error = done.stderr.decode()
        assert "Traceback" not in error, error
        return error

    def sh(self, machine: str, script: str) -> str:
        """Runs a shell script in a machine, by the SDK (a process less than by the command line); its output."""
        with Forky(home=self.home, start=False) as forky:
            done = forky.get(machine).exec(["sh", "-c", script])
        assert done.exit_code == 0, f"{script!r} in {machine}: {done}"
        return done.stdout.decode().strip()

    def pid(self, daemon: str) -> int:
        """The pid of a daemon."""
        return int(self.json("status")[daemon]["pid"])

    def hostd_serves(self) -> bool:
        """Whether hostd is up and the controller has found it."""
        with Forky(home=self.home, start=False) as forky:
            status = forky.status()
        return status.hostd is not None and not status.hostd_error

    def kill9(self, *daemons: str) -> None:
        """Kills daemons and waits until they are gone."""
        pids = [self.pid(daemon) for daemon in daemons]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def explain(self, done: subprocess.CompletedProcess[bytes]) -> str:
        """What a failed command said, and the daemons' last lines."""
        parts = [done.stdout.decode(errors="replace")[-2000:], done.stderr.decode(errors="replace")[-2000:]]
        parts += [
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            for log in sorted(self.home.glob("logs/*.log"))
        ]
        return "\n".join(parts)

    def processes(self) -> dict[int, str]:
        """Processes that belong to this home, by their command line or environment: pid -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid() or _zombie(int(entry.name)):
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            home = str(self.home).encode()
            if home in command or b"FORKY_HOME=" + home + b"\0" in environment:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")[:300]
        return found

    def mounts(self) -> list[str]:
        """Mounts below this home."""
        return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.home) in line]

    def end(self) -> None:
        """`forky down`, and proof that it left nothing. Whatever is left all the same is ended, by pid."""
        try:
            self.ok("down")
            left = self.processes()
            assert not left, f"down left processes: {left}"
            assert not self.mounts(), f"down left mounts: {self.mounts()}"
            assert not self.networks(), f"down left in the network: {self.networks()}"
            assert not self.cgroups(), f"down left cgroups: {self.cgroups()}"
        finally:
            self.clear()

    def clear(self) -> None:
        """Ends and removes whatever is left, by pid and by name."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 60  # a killed QEMU gives its memory back first, and is in its cgroup until then
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        for mount in self.mounts():
            subprocess.run(["umount", "-l", mount.split()[1]], check=False)
        for path in Path("/run/netns").glob(f"forky-{self.name}-*"):
            subprocess.run(["ip", "netns", "delete", path.name], check=False)
        subprocess.run(["ip", "netns", "delete", self.netns], check=False)  # and all that is in it
        for tree in self.cgroups():
            subprocess.run(["find", tree, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";"], check=False)

    def networks(self) -> list[str]:
        """What is left of this instance's network: namespaces, interfaces, tables."""
        found = [path.name for path in Path("/run/netns").glob(f"forky-{self.name}-*")]
        links = json.loads(ip("-n", self.netns, "-j", "link"))
        found += [link["ifname"] for link in links if link["ifname"].startswith("fk")]
        tables = subprocess.run(self.inside("nft", "list", "tables"), capture_output=True, check=True)
        return found + [line for line in tables.stdout.decode().splitlines() if "forky" in line]

    def cgroups(self) -> list[str]:
        """Cgroups of this instance."""
        return [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/forky-{self.name}")]


def ip(*arguments: str) -> str:
    """Runs iproute2's ip."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def new_instance(**settings: str) -> Instance:
    """A fresh home whose images are the cached ones."""
    home = Path(tempfile.mkdtemp(prefix="forky-test-", dir="/tmp"))
    if not IMAGES.is_dir():
        pytest.fail(f"no test image in {IMAGES}: run `make test`, which builds it")
    (home / "images").symlink_to(IMAGES)
    return Instance(home, **settings)


def mostly_long(steps: Sequence[str], *, always: Collection[str]) -> list[Any]:
    """Parameters: those of `always` are tried by `make test`, all of them by `make test-all`."""
    assert set(always) <= set(steps)
    return [step if step in always else pytest.param(step, marks=pytest.mark.long) for step in steps]


@pytest.fixture(scope="session")
def shared() -> Iterator[Instance]:
    """The instance of all files that need none of their own: starting and ending one takes half a minute."""
    instance = new_instance()
    try:
        yield instance
    finally:
        instance.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


@pytest.fixture(scope="module")
def forky(shared: Instance) -> Iterator[Instance]:
    """An instance for the tests of one file; what they leave is removed after them."""
    yield shared
    shared.ok("rm", "--all")
    for snapshot in reversed(shared.json("snapshots")):  # what stands on another goes first
        if snapshot["kind"] == "kept":
            shared.ok("rm", snapshot["id"])


@pytest.fixture
def clean(forky: Instance) -> Iterator[Instance]:
    """The module's instance; the machines that a test leaves are removed after it."""
    yield forky
    forky.run("rm", "--all")
