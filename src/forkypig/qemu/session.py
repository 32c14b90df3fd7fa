"""A QMP session: commands with deadlines, events that end with the connection, descriptors by SCM_RIGHTS.

Over `qemu.qmp`, which speaks the protocol. What is added: every wait has a deadline, an event wait also ends when
QEMU does, and failures are ours, naming the process.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError

from forkypig.errors import MachineFailed

# QEMU answers in a millisecond; under TCG on a busy host the main loop may wait for seconds behind vCPU threads.
COMMAND_TIMEOUT_S = 20.0


class Session:
    """One client's QMP connection to one QEMU process."""

    def __init__(self, process_id: str) -> None:
        self.process_id = process_id
        self._client = QMPClient(process_id)
        self._client.logger.setLevel(60)  # it logs the EOF of every QEMU that quits as an error
        self._descriptor_lock = asyncio.Lock()
        self._ended = asyncio.Event()
        self._shutdown = EventListener(("SHUTDOWN",))
        self._client.register_listener(self._shutdown)

    async def connect(self, path: Path, timeout_s: float) -> None:
        """Connects to a socket that listens already and waits for QEMU's greeting."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(str(path))
        except (ConnectError, QMPError, TimeoutError, OSError) as error:
            raise MachineFailed(f"QEMU {self.process_id} did not answer on its monitor") from error

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Any:
        """Runs one command and returns what QEMU returned. Raises MachineFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise MachineFailed(f"QEMU {self.process_id} refused {command}: {error}") from error
        except TimeoutError as error:
            raise MachineFailed(f"QEMU {self.process_id} did not answer {command} in {timeout_s:g} s") from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise MachineFailed(f"QEMU {self.process_id} ended during {command}") from error

    @property
    def version(self) -> tuple[int, int]:
        """QEMU's major and minor version, as its greeting said. Only after `connect`."""
        assert self._client.greeting is not None
        qemu: Any = self._client.greeting.QMP.version["qemu"]
        return int(qemu["major"]), int(qemu["minor"])

    async def send_descriptor(self, fd: int, name: str) -> None:
        """Gives QEMU a copy of `fd` under `name`, for `fd:NAME`; QEMU closes it after its use."""
        await self._send_descriptor(fd, "getfd", {"fdname": name})

    async def send_descriptor_set(self, fd: int, set_id: int) -> None:
        """Gives QEMU a copy of `fd`, which it opens as the file /dev/fdset/`set_id`. It keeps the copy to its end."""
        await self._send_descriptor(fd, "add-fd", {"fdset-id": set_id})

    async def _send_descriptor(self, fd: int, command: str, arguments: Mapping[str, Any]) -> None:
        """The descriptor travels with the command's bytes, so nothing may come between the two."""
        async with self._descriptor_lock:
            try:
                self._client.send_fd_scm(fd)
            except (OSError, QMPError, AssertionError) as error:
                raise MachineFailed(f"QEMU {self.process_id} ended while it was given a descriptor") from error
            await self.execute(command, arguments)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator["Events"]:
        """Listens for events by name from here on."""
        listener = EventListener(names or None)
        with self._client.listen(listener):
            yield Events(self, listener)

    @property
    def shut_down(self) -> bool:
        """Whether QEMU has said that it shuts down: the guest powered off, or somebody asked QEMU to quit."""
        return not self._shutdown.empty()

    def mark_ended(self) -> None:
        """The process has ended: whoever waits for an event is told."""
        self._ended.set()

    async def close(self) -> None:
        """Disconnects; QEMU goes on."""
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            async with asyncio.timeout(2):
                await self._client.disconnect()


class Events:
    """A subscription."""

    def __init__(self, session: Session, listener: EventListener) -> None:
        self._session, self._listener = session, listener

    async def next(self, timeout_s: float) -> Mapping[str, Any]:
        """The next event. Raises MachineFailed when QEMU ends or the time runs out."""
        wanted = asyncio.ensure_future(self._listener.get())
        ended = asyncio.ensure_future(self._session._ended.wait())
        try:
            await asyncio.wait({wanted, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return dict(wanted.result())
            why = "ended" if ended.done() else f"sent no event in {timeout_s:g} s"
            raise MachineFailed(f"QEMU {self._session.process_id} {why}")
        finally:
            for future in (wanted, ended):
                future.cancel()
