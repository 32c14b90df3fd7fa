"""Starting and ending the daemons of a home, with processes that behave as ours do."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig import errors, model
from forkypig.daemon.home import Home
from forkypig.daemon.server import PidFile
from forkypig.sdk import local, pids, shutdown

_DAEMON = Path(__file__).with_name("fake_daemon.py")


class Manners(dict[str, str]):
    """How each daemon is to behave: good unless said otherwise."""

    def argv(self, daemon: str) -> list[str]:
        return [sys.executable, str(_DAEMON), daemon, self.get(daemon, "good")]


@pytest.fixture
def manners(monkeypatch: pytest.MonkeyPatch) -> Manners:
    made = Manners()
    monkeypatch.setattr(local, "daemon_argv", made.argv)
    return made


@pytest.fixture
async def home(tmp_path: Path, manners: Manners) -> AsyncIterator[Home]:
    place = Home(tmp_path / "home")
    yield place
    for daemon in local.DAEMONS:
        await pids.end(daemon, place.pid_file(daemon))


def starts(home: Home) -> list[str]:
    return [line.split()[0] for line in (home.home / "starts").read_text().splitlines()]


async def test_up_starts_in_order_and_once(home: Home) -> None:
    told: list[model.Progress] = []
    await local.up(home, told.append)
    await local.up(home)
    assert starts(home) == ["pager", "hostd", "controller"]
    assert [progress.step for progress in told] == [f"starting the {daemon}" for daemon in local.DAEMONS]
    assert (home.run.stat().st_mode & 0o777, local.all_run(home)) == (0o700, True)


async def test_two_at_once(home: Home) -> None:
    await asyncio.gather(local.up(home), local.up(home), local.up(home))
    assert sorted(starts(home)) == ["controller", "hostd", "pager"]


async def test_only_what_died_is_started_again(home: Home) -> None:
    await local.up(home)
    pid = pids.running_pid(home.pid_file("hostd"))
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while pids.running_pid(home.pid_file("hostd")) is not None:
        await asyncio.sleep(0.01)
    await local.up(home)
    assert starts(home) == ["pager", "hostd", "controller", "hostd"]


async def test_one_that_was_dying_when_it_was_looked_at_is_started_again(home: Home) -> None:
    await local.up(home)
    pid = pids.running_pid(home.pid_file("hostd"))
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it holds its pid file and answers nobody, like one that is being killed
    starting = asyncio.create_task(local.up(home))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(starting, 60)
    assert starts(home) == ["pager", "hostd", "controller", "hostd"]


async def test_one_that_does_not_start_is_told_with_its_last_words(home: Home, manners: Manners) -> None:
    manners["hostd"] = "broken"
    with pytest.raises(errors.HostUnreachable, match=r"the hostd did not start \(exit code 1\).*\n  hostd is broken"):
        await local.up(home)
    assert starts(home) == ["pager"]


async def test_a_start_that_is_given_up_leaves_no_daemon_that_down_does_not_find(home: Home, manners: Manners) -> None:
    manners["hostd"] = "slow"
    starting = asyncio.create_task(local.up(home))
    while not (home.home / "slow").exists():
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    [child] = [each for each in local._started if each.args == manners.argv("hostd")]
    assert child.poll() == -signal.SIGTERM
    assert pids.running_pid(home.pid_file("pager")) is not None  # it served already
    manners["hostd"] = "good"
    await local.up(home)
    assert starts(home) == ["pager", "hostd", "controller"]


async def test_down_shuts_down_and_ends_all(home: Home) -> None:
    await local.up(home)
    told: list[model.Progress] = []
    assert await shutdown.down(home, told.append)
    assert [progress.step for progress in told][-4:] == [
        "shutting down machines",
        "ending the controller",
        "ending the hostd",
        "ending the pager",
    ]
    assert (home.home / "shutdowns").read_text() == "x"
    assert not list(home.run.glob("*.sock"))
    assert not any(pids.running_pid(home.pid_file(daemon)) for daemon in local.DAEMONS)
    assert not await shutdown.down(home)
    assert (home.home / "shutdowns").read_text() == "x"


async def test_down_after_everything_died_starts_what_can_end_the_machines(home: Home) -> None:
    await local.up(home)
    (home.machines / "m-0123456789ab").mkdir(parents=True)
    for daemon in local.DAEMONS:
        pid = pids.running_pid(home.pid_file(daemon))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    while any(pids.running_pid(home.pid_file(daemon)) for daemon in local.DAEMONS):
        await asyncio.sleep(0.01)
    assert await shutdown.down(home)
    assert starts(home)[3:] == ["pager", "hostd"]
    assert (home.home / "shutdowns").read_text() == "x"
    assert not await shutdown.down(home)
    assert len(starts(home)) == 5


async def test_down_needs_no_daemon_when_none_but_the_pager_was_tried(home: Home, manners: Manners) -> None:
    """A pager that can't start (another key) has started no machine, so nothing hangs on it."""
    await local.up(home)
    (home.machines / "m-0123456789ab").mkdir(parents=True)
    assert await shutdown.down(home)
    manners["pager"] = "broken"
    with pytest.raises(errors.HostUnreachable):
        await local.up(home)
    assert not await shutdown.down(home)


async def test_a_daemon_that_does_not_want_to_end_is_killed(
    home: Home, manners: Manners, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pids, "TERM_S", 0.5)
    manners["controller"] = "stubborn"
    await local.up(home)
    await shutdown.down(home)
    assert not any(pids.running_pid(home.pid_file(daemon)) for daemon in local.DAEMONS)
    assert "killing it" in caplog.text


async def test_machines_that_can_not_be_shut_down_keep_their_daemons(home: Home, manners: Manners) -> None:
    manners["hostd"] = "deaf"
    await local.up(home)
    with pytest.raises(errors.ResourceExhausted, match="disk is full"):
        await shutdown.down(home)
    assert local.all_run(home)
    assert await shutdown.down(home, force=True)
    assert not any(pids.running_pid(home.pid_file(daemon)) for daemon in local.DAEMONS)
    assert not local.clean_mark(home).exists()


def test_a_pid_counts_only_while_its_file_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "pager.pid"
    assert pids.running_pid(path) is None
    path.write_text(f'{{"pid": {os.getpid()}}}')  # alive, but not a daemon of this home
    assert pids.running_pid(path) is None
    path.write_text("rubbish")
    assert pids.running_pid(path) is None
    held = PidFile(path)
    assert pids.running_pid(path) == os.getpid()
    os.close(held._fd)
    assert pids.running_pid(path) is None


def test_mounts_are_seen() -> None:
    assert shutdown.is_mount(Path("/proc"))
    assert not shutdown.is_mount(Path("/proc/self"))
