"""A QEMU process: started in a session of its own so that it outlives hostd, found again by its command line.

A process is ours when its command line says so: `guest=<process id>`. A pid alone is never believed, and signals go
through a pidfd, so a pid that was reused can't be hit.
"""

import asyncio
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from forkypig.errors import MachineFailed, ResourceExhausted
from forkypig.qemu import priority
from forkypig.qemu.command import CommandLine, Inherited
from forkypig.qemu.session import Session

log = structlog.get_logger()

# A shell answers in 50 ms when the host is idle; with hundreds starting on two cores the last one waits for its turn.
START_TIMEOUT_S = 60.0

_PIDFD_GETFD = 438  # the number of the system call, on every architecture
_libc = ctypes.CDLL(None, use_errno=True)

Place = Callable[[], contextlib.AbstractContextManager[None]]


class Process:
    """One QEMU process and its QMP session."""

    def __init__(self, process_id: str, directory: Path, pid: int, pidfd: int) -> None:
        """`start` and `adopt` make these."""
        self.id = process_id
        self.directory = directory
        self.pid = pid
        self._pidfd = pidfd
        self.session = Session(process_id)
        self.ended = asyncio.Event()
        # What its disk is made of, the overlay first; None: not known, since an earlier hostd started it.
        self.disks: Sequence[tuple[Path, str]] | None = None
        self.disks_lock = asyncio.Lock()  # from `stop` to `freeze` of a split nobody else may touch them
        self._exited_in_peace = False
        self.on_end: Callable[[], object] | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._has_ended)

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    async def start(
        cls, directory: Path, command: CommandLine, tap_fd: int = -1, place: Place = contextlib.nullcontext
    ) -> "Process":
        """Starts QEMU and waits for its monitor. On failure nothing of it is left running.

        `place` is entered by the thread that starts it: what QEMU inherits of it (a namespace) it keeps.
        """
        pid = await asyncio.to_thread(_spawn, directory, command, tap_fd, place)
        try:
            process = cls(command.process_id, directory, pid, os.pidfd_open(pid))
        except OSError as error:
            raise MachineFailed(f"QEMU {command.process_id} ended at its start: {last_words(directory)}") from error
        process.disks = command.disks
        try:
            await process._connect(START_TIMEOUT_S)
        except BaseException:
            await process.kill()
            raise
        return process

    @classmethod
    async def adopt(cls, directory: Path, process_id: str, pid: int, *, connect: bool) -> "Process":
        """Takes over a process that an earlier hostd started. `connect`: also its monitor (not of a frozen one)."""
        try:
            process = cls(process_id, directory, pid, os.pidfd_open(pid))
        except OSError as error:
            raise MachineFailed(f"QEMU {process_id} has ended") from error
        if connect:
            try:
                await process._connect(10.0)
            except BaseException:
                process.release()
                raise
        return process

    async def _connect(self, timeout_s: float) -> None:
        connecting = asyncio.ensure_future(self.session.connect(self.directory / "qmp.sock", timeout_s))
        ending = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise MachineFailed(f"QEMU {self.id} ended at its start: {last_words(self.directory)}")
            await connecting
        finally:
            for future in (connecting, ending):
                future.cancel()

    def tap(self) -> int:
        """A descriptor of its own on the tap that this QEMU has open; -1 when it has none. The caller closes it.

        Raises MachineFailed when it can't be had.
        """
        number = _option(Path(f"/proc/{self.pid}"), "-netdev", "fd=")
        if not number:
            return -1
        descriptor = int(_libc.syscall(_PIDFD_GETFD, self._pidfd, int(number), 0))
        if descriptor < 0:
            raise MachineFailed(f"the tap of QEMU {self.id} can't be had: {os.strerror(ctypes.get_errno())}")
        return descriptor

    # -- its end -----------------------------------------------------------------------------------------------------

    def _has_ended(self) -> None:
        self._forget_pidfd()
        with contextlib.suppress(ChildProcessError):  # adopted ones are init's children
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._exited_in_peace = pid == self.pid and status == 0
        self.session.mark_ended()
        self.ended.set()
        if self.on_end is not None:
            self.on_end()

    def _forget_pidfd(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    @property
    def shut_down(self) -> bool:
        """Whether QEMU ended in peace: by the guest's power-off or reboot, or by a request.

        Its last word on the monitor may come later than the news of its end; its exit status does not.
        """
        return self.session.shut_down or self._exited_in_peace

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; a process that has ended ignores it."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def freeze(self) -> None:
        """Stops it for ever: from here on its memory is a snapshot."""
        self.signal(signal.SIGSTOP)

    async def kill(self) -> None:
        """Ends it at once; safe to call twice and on a frozen one."""
        self.on_end = None
        self.signal(signal.SIGKILL)
        if not self.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):  # a process in an uninterruptible wait must not hang us
                    await self.ended.wait()
        if not self.ended.is_set():
            log.error("QEMU does not die", process=self.id, pid=self.pid)
        await self.session.close()

    def release(self) -> None:
        """Lets go of it without ending it."""
        self.on_end = None
        self._forget_pidfd()

    async def quit(self, timeout_s: float = 5.0) -> None:
        """Asks it to end (flushing its disk), then kills it."""
        self.on_end = None
        with contextlib.suppress(MachineFailed):
            await self.session.execute("quit", timeout_s=timeout_s)
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(TimeoutError):
                    await self.ended.wait()
        if not self.ended.is_set():
            log.warning("QEMU did not quit, killing it", process=self.id, pid=self.pid)
        await self.kill()


def _spawn(directory: Path, command: CommandLine, tap_fd: int, place: Place) -> int:
    """Starts the process with its sockets listening; returns its pid. Blocks for some milliseconds."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_listener(directory / name)) for name in ("qmp.sock", "agent.sock")]
        output = stack.enter_context((directory / "qemu.log").open("ab"))
        descriptors = [s.fileno() for s in sockets]
        arguments = command.arguments(Inherited(descriptors[0], descriptors[1], tap_fd))
        if tap_fd >= 0:
            descriptors.append(tap_fd)
        stack.enter_context(place())
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=descriptors,
                cwd="/",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise MachineFailed(f"there is no {arguments[0]}: install qemu-system-x86, or set FORKY_QEMU") from error
        except OSError as error:
            raise ResourceExhausted(f"the host can't start another QEMU: {error.strerror}") from error
    if command.boot is None:
        priority.background(process.pid)
    process.returncode = 0  # reaped through the pidfd; without this Popen would wait for it a second time
    return process.pid


def _listener(path: Path) -> socket.socket:
    """A listening socket at `path`. QEMU inherits it, so a client may connect before QEMU is up."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def last_words(directory: Path) -> str:
    """The last line that QEMU printed."""
    try:
        lines = (directory / "qemu.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][-300:] if lines else "it printed nothing"


def running(directory: Path) -> dict[str, int]:
    """Our QEMU processes that run or are frozen now: process id -> pid, for process directories below `directory`.

    Known by their command line and by an open file below `directory`'s parent, so another instance's are left alone.
    """
    found: dict[str, int] = {}
    known = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        process_id = _process_id(entry)
        if process_id in known and not _is_zombie(entry):
            found[process_id] = int(entry.name)
    return found


def _process_id(proc: Path) -> str:
    """The id in a QEMU command line; empty for other processes."""
    found = _option(proc, "-name", "guest=")
    return found if found.startswith("q-") else ""


def _option(proc: Path, option: str, key: str) -> str:
    """What stands behind `key` in the value of an option of a command line; empty when it is not there."""
    try:
        arguments = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    for before, value in itertools.pairwise(arguments):
        for part in value.split(",") if before == option else ():
            if part.startswith(key):
                return part.removeprefix(key)
    return ""


def _is_zombie(proc: Path) -> bool:
    try:
        return (proc / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def is_frozen(pid: int) -> bool:
    """Whether the process was stopped by a signal (state T in proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
