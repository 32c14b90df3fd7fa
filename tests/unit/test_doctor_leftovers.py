"""Leftovers are found, and what is in use or another instance's is left alone."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkypig.daemon.settings import Settings
from forkypig.hostd.doctor import leftovers


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings(home=tmp_path / "home")
    found.run.mkdir(parents=True)
    return found


@pytest.fixture
def stand_in(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the command line of a QEMU of this home, that sleeps."""
    console = settings.home / "consoles/q-0badcafe.log"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "-name", "guest=q-0badcafe,process=forky-q-0badcafe",
         "-chardev", f"file,id=console,path={console},append=on"]
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while b"guest=" not in Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.005)
    yield process
    process.kill()
    process.wait()


def test_a_process_without_its_directory_is_lost(settings: Settings, stand_in: subprocess.Popen[bytes]) -> None:
    assert leftovers.lost_processes(settings.home) == [stand_in.pid]
    (settings.home / "qemu/q-0badcafe").mkdir(parents=True)
    assert leftovers.lost_processes(settings.home) == []


def test_another_instance_s_process_is_not_ours(settings: Settings, stand_in: subprocess.Popen[bytes]) -> None:
    assert leftovers.lost_processes(settings.home.with_name("hom")) == []
    assert leftovers.lost_processes(settings.home.with_name("other")) == []


async def test_the_finding_says_what_to_end(settings: Settings, stand_in: subprocess.Popen[bytes]) -> None:
    found = {check.name: check for check in await leftovers.checks(settings)}
    assert found["leftover processes"].remedy.endswith(f"kill -9 {stand_in.pid}")


async def test_a_socket_is_stale_when_nobody_listens(settings: Settings) -> None:
    path = settings.socket("hostd")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        assert not leftovers.is_stale(path)
    assert leftovers.is_stale(path)
    found = {check.name: check for check in await leftovers.checks(settings)}
    assert "hostd.sock" in found["leftover sockets"].detail


async def test_mounts_below_the_home(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are mountinfo's; a space in a path is written \\040 there."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    home = settings.home.with_name("my home")
    escaped = str(home).replace(" ", "\\040")
    rows = [
        f"{n} 1 0:{n} / {point} rw - fuse x rw"
        for n, point in enumerate(["/", escaped, f"{escaped}/memory", f"{escaped}er"])
    ]
    (proc / "self/mountinfo").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(leftovers, "PROC", proc)
    assert leftovers.mounts_below(home) == [home / "memory"]


async def test_no_leftovers_in_a_fresh_home(settings: Settings) -> None:
    assert [check.verdict for check in await leftovers.checks(settings)] == ["ok"] * 3
