"""The resolvers of the host, which names of outside are passed on to: raw, as they came, over the same transport."""

import asyncio
import contextlib
import os
import secrets
import struct
from pathlib import Path
from typing import cast

import structlog

log = structlog.get_logger()

RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53

# A program's own resolver waits 5 s before it asks again (resolv.conf(5)); two of ours have had their chance by then.
TIMEOUT_S = 2.0
TRIES = 2


class Upstream:
    """Knows whom to ask, and asks."""

    def __init__(self, nameservers: tuple[str, ...], resolv_conf: Path = RESOLV_CONF) -> None:
        """`nameservers`: addresses; empty: those in `resolv_conf`, which is read again when it has changed."""
        self._fixed = nameservers
        self._file = resolv_conf
        self._read: tuple[str, ...] = ()
        self._stamp: tuple[int, int] | None = None

    def servers(self) -> tuple[str, ...]:
        """Whom to ask, in this order."""
        if self._fixed:
            return self._fixed
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self._stamp:
                self._read = parse_resolv_conf(self._file.read_text(errors="replace"))
                self._stamp = stamp
        except OSError as error:
            log.warning("no-resolvers", file=str(self._file), error=error.strerror)
            self._read, self._stamp = (), None
        return self._read

    async def ask(self, query: bytes, *, tcp: bool) -> bytes | None:
        """The answer to a query in wire format, with the query's number; None when nobody gave one in time."""
        ask = _ask_tcp if tcp else _ask_udp
        for server in self.servers()[:TRIES]:
            # A number of our own: who sees the machine's can't forge an answer to us with it.
            number = secrets.token_bytes(2)
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(TIMEOUT_S):
                    answer = await ask(server, number + query[2:])
                return query[:2] + answer[2:]
        return None


def parse_resolv_conf(text: str) -> tuple[str, ...]:
    """The addresses behind `nameserver`; see resolv.conf(5)."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            found.append(words[1])
    return tuple(found)


def is_answer(query: bytes, answer: bytes) -> bool:
    """Whether `answer` has the number of `query`, and says that it is one."""
    return len(answer) >= 12 and answer[:2] == query[:2] and bool(answer[2] & 0x80)


class _Waiting(asyncio.DatagramProtocol):
    """One query over UDP: a socket, hence a port, of its own, so that forged answers have to guess it."""

    def __init__(self, query: bytes) -> None:
        self._query = query
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.DatagramTransport, transport).sendto(self._query)  # asyncio's own is none by inheritance

    def datagram_received(self, data: bytes, addr: object) -> None:
        if is_answer(self._query, data) and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_udp(server: str, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    transport, waiting = await loop.create_datagram_endpoint(lambda: _Waiting(query), remote_addr=(server, PORT))
    try:
        return await waiting.answer
    finally:
        waiting.answer.cancel()
        transport.close()


async def _ask_tcp(server: str, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, PORT)
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        answer = await reader.readexactly(length)
        if not is_answer(query, answer):
            raise ConnectionError(os.strerror(71))  # EPROTO
        return answer
    finally:
        writer.close()
