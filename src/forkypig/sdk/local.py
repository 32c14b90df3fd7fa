"""Starts the daemons of one home, and tells which run. `shutdown` ends them.

They are started in the order in which they need each other: the pager serves hostd's machines, hostd serves the
controller. One `up` at a time works on a home; others wait for it and then find everything done.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from forkypig import errors, model
from forkypig.daemon.home import Home, HomePaths, home_from_environment
from forkypig.sdk import pids
from forkypig.sdk.connection import calls, is_healthy, open_channel
from forkypig.sdk.pids import running_pid
from forkypig.sdk.status import Daemon, Status
from forkypig.v1 import common_pb2, controller_pb2_grpc

DAEMONS = ("pager", "hostd", "controller")
REST = "rest"
# hostd adopts machines and may look whether KVM boots a guest before it serves, and computers are busy.
_START_S = 90.0
_LOCK_S = 300.0  # somebody else's `up` or `down`, which may be writing gigabytes
_POLL_S = 0.05
_STATUS_S = 15.0  # the controller itself waits for hostd and the pager
_CONNECTED_S = 5.0  # the back-off is at most a second
_TAIL_LINES = 15
# Daemons are our children until we end; kept here, they are reaped if they end first.
_started: list[subprocess.Popen[bytes]] = []

OnProgress = Callable[[model.Progress], None]


def place(home: str | Path | None = None) -> Home:
    """The paths of `home`, or of the environment's. Raises InvalidRequest when they can't be used."""
    found = home_from_environment() if home is None else Home(Path(home).absolute())
    try:
        found.check()
    except ValueError as error:
        raise errors.InvalidRequest(str(error)) from error
    return found


def own_place() -> Home:
    """As `place`, for what works on this computer alone. Raises InvalidRequest when another's controller is chosen."""
    if named := os.environ.get("FORKY_CONTROLLER", ""):
        raise errors.InvalidRequest(
            f"this works on the controller's own computer alone, and FORKY_CONTROLLER is {named[:80]}: run it there, "
            "or unset FORKY_CONTROLLER"
        )
    return place()


def daemons() -> tuple[str, ...]:
    """Those of a home: the controller alone, where FORKY_HOSTD names the hostd of another."""
    return ("controller",) if os.environ.get("FORKY_HOSTD") else DAEMONS


def all_run(at: HomePaths) -> bool:
    """Whether all daemons of the home run (not whether they are well), and the REST API where it is wanted."""
    wanted = (*daemons(), REST) if _rest_wanted(at).exists() else daemons()
    return all(running_pid(at.pid_file(daemon)) is not None for daemon in wanted)


def clean_mark(at: HomePaths) -> Path:
    """There from an orderly `down` until hostd is started, which alone starts QEMU: none is left to look for."""
    return at.run / "down"


def make_home(at: HomePaths) -> None:
    """Makes the directories. Root's home may be passed through by QEMU's own user, nobody else's may.

    Raises NotPossibleNow when the file system does not let us."""
    try:
        if not at.home.exists():
            at.home.mkdir(parents=True, exist_ok=True)
            at.home.chmod(0o711 if os.geteuid() == 0 else 0o700)  # whatever the umask
        at.run.mkdir(mode=0o700, exist_ok=True)
        at.logs.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise errors.NotPossibleNow(
            f"{at.home} can't be used as a home ({error.strerror}): set FORKY_HOME to a directory that you can write"
        ) from error


@contextlib.asynccontextmanager
async def locked(at: HomePaths) -> AsyncIterator[None]:
    """One `up` or `down` of a home at a time. Raises DeadlineExceeded."""
    fd = os.open(at.run / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() > deadline:
                    raise errors.DeadlineExceeded(
                        f"another `forky up` or `forky down` has held {at.run / 'up.lock'} for {_LOCK_S:.0f} s: "
                        "see what it does, or end it"
                    ) from None
                await asyncio.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


async def up(at: HomePaths, on_progress: OnProgress | None = None) -> None:
    """Starts what does not run, and waits until each serves. Harmless when all run already.

    Raises HostUnreachable with the end of its log when a daemon does not start."""
    make_home(at)
    async with locked(at):
        await start(at, daemons(), on_progress)
        await _connected(at)
        await _start_rest(at, on_progress)


async def _start_rest(at: HomePaths, on_progress: OnProgress | None) -> None:
    """The REST API, where FORKY_REST asks for it, or an `up` before this one did: then at the same address."""
    from forkypig.daemon.settings import Settings  # pydantic: a tenth of a second that other commands don't pay

    mark = _rest_wanted(at)
    address = Settings(home=at.home).rest or (mark.read_text() if mark.exists() else "")
    if not address or running_pid(at.pid_file(REST)) is not None:
        return
    if on_progress is not None:
        on_progress(model.Progress("starting the REST API", len(DAEMONS), len(DAEMONS) + 1))
    log_file = at.logs / f"{REST}.log"
    began = log_file.stat().st_size if log_file.exists() else 0
    _rest_mark(at).unlink(missing_ok=True)  # of one that was killed
    child = _spawn(at, REST, log_file, FORKY_REST=address)
    deadline = asyncio.get_running_loop().time() + _START_S
    try:
        while not _rest_mark(at).exists():
            if child.poll() is not None:
                raise errors.HostUnreachable(
                    f"the REST API did not start (exit code {child.returncode}): {_tail(at, REST, began)}"
                )
            if asyncio.get_running_loop().time() > deadline:
                raise errors.HostUnreachable(
                    f"the REST API does not serve after {_START_S:.0f} s: {_tail(at, REST, began)}"
                )
            await asyncio.sleep(_POLL_S)
    except BaseException:
        await pids.end_child(REST, child)
        raise
    mark.write_text(address)


async def end_rest(at: HomePaths) -> None:
    """Ends the REST API; the next command does not start it again."""
    _rest_wanted(at).unlink(missing_ok=True)
    await pids.end(REST, at.pid_file(REST))


def _rest_mark(at: HomePaths) -> Path:
    """There while the REST API serves: it says where."""
    return at.run / "rest.address"


def _rest_wanted(at: HomePaths) -> Path:
    """There from an `up` that started the REST API to the next `down`, with what FORKY_REST was."""
    return at.run / "rest.wanted"


async def _connected(at: HomePaths) -> None:
    """Waits until the controller has found hostd: a hostd that was started again is noticed after a back-off. When it
    is not found the controller says so itself, call by call."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CONNECTED_S):
            while (await status(at)).hostd_error:  # noqa: ASYNC110 - another process, nothing to wait on
                await asyncio.sleep(0.05)


async def start(at: HomePaths, daemons: tuple[str, ...], on_progress: OnProgress | None = None) -> None:
    """Starts these daemons if they don't run; the caller holds the lock."""
    for number, daemon in enumerate(daemons):
        if on_progress is not None:
            on_progress(model.Progress(f"starting the {daemon}", number, len(daemons)))
        log_file = at.logs / f"{daemon}.log"
        began = log_file.stat().st_size if log_file.exists() else 0
        if daemon == "hostd":
            clean_mark(at).unlink(missing_ok=True)
        child = None if running_pid(at.pid_file(daemon)) is not None else _spawn(at, daemon, log_file)
        await _serving(at, daemon, child, began)


def daemon_argv(daemon: str) -> list[str]:
    """The program of a daemon. -P: nothing is imported from the directory that it starts in."""
    return [sys.executable, "-P", "-m", f"forkypig.{daemon}"]


def _spawn(at: HomePaths, daemon: str, log_file: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A daemon in a session of its own, away from our terminal and its Ctrl-C. `variables`: besides our environment."""
    _started[:] = [child for child in _started if child.poll() is None]
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            daemon_argv(daemon),
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd="/",
            env={**os.environ, "FORKY_HOME": str(at.home), **variables},
            start_new_session=True,
        )
    finally:
        os.close(fd)
    _started.append(child)
    return child


async def _serving(at: HomePaths, daemon: str, child: subprocess.Popen[bytes] | None, began: int) -> None:
    """Waits until the daemon says that it serves. `child` None: it ran already. `began`: where in its log this start
    begins. What was started here is ended if it does not come to that."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _START_S
    try:
        while not (_has_socket(at, daemon) and await is_healthy(at.socket(daemon), timeout_s=2.0)):
            if child is None and running_pid(at.pid_file(daemon)) is None:
                # It was killed when we looked, and had not ended yet: one with much memory takes a while.
                child = _spawn(at, daemon, at.logs / f"{daemon}.log")
            # One that lost the race for the pid file to another start (systemd's, say) ends, and the other serves.
            if child is not None and child.poll() is not None and running_pid(at.pid_file(daemon)) is None:
                raise errors.HostUnreachable(
                    f"the {daemon} did not start (exit code {child.returncode}): {_tail(at, daemon, began)}"
                )
            if loop.time() > deadline:
                raise errors.HostUnreachable(
                    f"the {daemon} does not answer on {at.socket(daemon)} after {_START_S:.0f} s: "
                    f"{_tail(at, daemon, began)}"
                )
            await asyncio.sleep(_POLL_S)
    except BaseException:  # Ctrl-C as well: one that has no pid file yet would be found by no `down`
        if child is not None:
            await pids.end_child(daemon, child)
        raise


def _has_socket(at: HomePaths, daemon: str) -> bool:
    """Asked before gRPC is: its attempts to connect to nothing take time from the daemon that is starting."""
    return at.socket(daemon).exists()


def _tail(at: HomePaths, daemon: str, began: int) -> str:
    """The last lines that this start wrote to its log, and where the others are."""
    log_file = at.logs / f"{daemon}.log"
    with log_file.open("rb") as file:
        file.seek(max(began, log_file.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    if not lines:
        return f"its log {log_file} says nothing"
    return f"the end of {log_file}:\n  " + "\n  ".join(lines)


async def status(at: HomePaths) -> Status:
    """What runs in the home, without starting anything: the pid files, and the controller's answer if it runs."""
    found = {daemon: running_pid(at.pid_file(daemon)) for daemon in (*DAEMONS, REST)}
    mark = _rest_mark(at)
    here = Status(
        home=at.home,
        controller=_daemon(found["controller"]),
        hostd=_daemon(found["hostd"]),
        pager=_daemon(found["pager"]),
        rest=_daemon(found[REST]),
        rest_address=mark.read_text().strip() if found[REST] is not None and mark.exists() else "",
        rest_error="it has died: forky up" if found[REST] is None and _rest_wanted(at).exists() else "",
    )
    if here.controller is None:
        return here
    socket = at.socket("controller")
    async with open_channel(socket) as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        try:
            with calls(socket):
                return here.with_answer(await stub.GetStatus(common_pb2.Empty(), timeout=_STATUS_S))
        except errors.ForkyError as error:
            return dataclasses.replace(here, controller_error=str(error))


def _daemon(pid: int | None) -> Daemon | None:
    return Daemon(pid) if pid is not None else None
