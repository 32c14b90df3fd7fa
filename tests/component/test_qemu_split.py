"""How a shell is given its device state, by QEMU's version; against a peer that speaks QMP on a real socket."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forkypig.errors import MachineFailed
from forkypig.qemu import split
from forkypig.qemu.process import Process


class Peer:
    """A QEMU's monitor: greets, says yes to everything, and tells how the load that it was asked for went."""

    def __init__(self, version: tuple[int, int], status: str) -> None:
        self.commands: list[dict[str, Any]] = []
        self.files: list[str] = []  # what the descriptors that came are open on
        self._version, self._status = version, status

    def serve(self, listener: socket.socket) -> None:
        """Serves one client, to its end. In a thread: asyncio's streams take no descriptors."""
        connection, _ = listener.accept()
        with connection:
            qemu = {"major": self._version[0], "minor": self._version[1], "micro": 0}
            self._send(connection, {"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": []}})
            text = ""
            while True:
                data, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
                for fd in descriptors:
                    self.files.append(os.readlink(f"/proc/self/fd/{fd}"))
                    os.close(fd)
                if not data:
                    return
                text += data.decode()
                # Objects follow each other without line ends, with a space that carries a descriptor in between.
                while text := text.lstrip():
                    command, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:]
                    self._answer(connection, command)

    def _answer(self, connection: socket.socket, command: dict[str, Any]) -> None:
        self.commands.append(command)
        self._send(connection, {"return": {}, "id": command.get("id")})
        if command["execute"] == "migrate-incoming":
            event = {"event": "MIGRATION", "data": {"status": self._status}}
            self._send(connection, {**event, "timestamp": {"seconds": 0, "microseconds": 0}})

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\r\n")

    def arguments(self, name: str) -> list[dict[str, Any]]:
        return [command.get("arguments", {}) for command in self.commands if command["execute"] == name]


@contextlib.asynccontextmanager
async def shell(directory: Path, version: tuple[int, int], status: str) -> AsyncIterator[tuple[Process, Peer]]:
    """A process (this one) whose monitor is a peer's."""
    peer = Peer(version, status)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "qmp.sock"))
        listener.listen()
        serving = asyncio.create_task(asyncio.to_thread(peer.serve, listener))
        process = await Process.adopt(directory, "q-1", os.getpid(), connect=True)
        try:
            yield process, peer
        finally:
            await process.session.close()
            process.release()
            await serving


@pytest.mark.parametrize(
    ("version", "given", "uri"),
    [
        ((7, 2), ("getfd", {"fdname": "state"}), "fd:state"),
        ((9, 0), ("getfd", {"fdname": "state"}), "fd:state"),
        # It warns that fd: on a file is deprecated, and its log's last line is what a user reads when it dies.
        ((9, 1), ("add-fd", {"fdset-id": 1}), "file:/dev/fdset/1"),
        ((10, 0), ("add-fd", {"fdset-id": 1}), "file:/dev/fdset/1"),
    ],
)
async def test_device_state_goes_by_the_way_that_this_qemu_likes(
    tmp_path: Path, version: tuple[int, int], given: tuple[str, dict[str, Any]], uri: str
) -> None:
    async with asyncio.timeout(30), shell(tmp_path, version, "completed") as (process, peer):
        await split.offer_state(process, tmp_path / "devices")
        await split.load(process, paused=True)
    assert peer.files == [str(tmp_path / "devices")]
    names = {"getfd", "add-fd"}
    assert [(c["execute"], c["arguments"]) for c in peer.commands if c["execute"] in names] == [given]
    assert peer.arguments("migrate-incoming") == [{"uri": uri}]


async def test_a_load_that_fails_says_what_qemu_said_last(tmp_path: Path) -> None:
    (tmp_path / "qemu.log").write_text("Unknown ramblock\n")
    async with asyncio.timeout(30), shell(tmp_path, (10, 0), "failed") as (process, _):
        with pytest.raises(MachineFailed, match="Unknown ramblock"):
            await split.load(process, paused=True)


async def test_packed_device_state_is_read_before_and_given_for_reading_only(tmp_path: Path) -> None:
    packed = tmp_path / "devices"
    packed.write_bytes(b"state" * 1000)
    with split.copied_state(packed) as fd:
        packed.unlink()
        assert os.read(fd, 1 << 20) == b"state" * 1000
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    async with asyncio.timeout(30), shell(tmp_path, (10, 0), "completed") as (process, peer):
        with pytest.raises(MachineFailed, match="can't be read"):
            await split.offer_state(process, packed, packed=True)
        packed.write_bytes(b"state")
        await split.offer_state(process, packed, packed=True)
    assert peer.files == ["/memfd:device-state (deleted)"]
