"""One connection to the Unix socket of QEMU's chardev: bytes in, bytes out, no meaning.

A raw socket and not an asyncio stream, because a move reads the old socket dry at one instant, without waiting.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

# While nobody listens yet the QEMU process is being started: look again this often.
_RETRY_S = 0.02
_READ_BYTES = 256 << 10


class Link:
    """A connected socket. Reading begins with `start`; `on_end` is called once, when the peer is gone."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._waiting = bytearray()
        self._on_data: Callable[[bytes], None] | None = None
        self._on_end: Callable[[str], None] | None = None
        self._closed = False

    @classmethod
    async def connect(cls, path: Path, deadline_s: float) -> "Link":
        """Connects, and waits up to `deadline_s` for somebody to listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + deadline_s
        while True:
            connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                await loop.sock_connect(connecting, str(path))
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                connecting.close()
                if loop.time() + _RETRY_S > give_up:
                    raise
                await asyncio.sleep(_RETRY_S)
            except BaseException:
                connecting.close()
                raise
            else:
                return cls(connecting)

    def start(self, on_data: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        """From now on `on_data` gets what comes; `on_end` says why nothing will come any more."""
        self._on_data, self._on_end = on_data, on_end
        self._loop.add_reader(self._socket, self._readable)

    def write(self, data: bytes) -> None:
        """Sends, or keeps what the socket does not take now. The callers bound how much that can be."""
        if self._closed:
            return
        if self._waiting:
            self._waiting += data
            return
        sent = self._send(data)
        if sent < len(data) and not self._closed:
            self._waiting += data[sent:]
            self._loop.add_writer(self._socket, self._writable)

    def read_dry(self) -> None:
        """Hands on all that lies in the socket now."""
        while self._read_once():
            pass

    def close(self) -> None:
        """Closes the socket, without a word to `on_end`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()

    def _readable(self) -> None:
        self._read_once()

    def _read_once(self) -> bool:
        """Whether something was there."""
        if self._closed or self._on_data is None:
            return False
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error.strerror or str(error))
            return False
        if not data:
            self._end("QEMU closed the connection")
            return False
        self._on_data(data)
        return True

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            # A prepared link whose QEMU ended is noticed when it is used.
            self._end(error.strerror or str(error))
            return 0

    def _writable(self) -> None:
        sent = self._send(self._waiting)
        del self._waiting[:sent]
        if not self._waiting and not self._closed:
            self._loop.remove_writer(self._socket)

    def _end(self, reason: str) -> None:
        if self._closed:
            return
        self.close()
        if self._on_end is not None:
            self._on_end(reason)
