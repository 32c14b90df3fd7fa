"""Other users of this computer: a Unix socket that all may connect to, on which the kernel says who did.

gRPC tells nobody a peer's credentials. So a front accepts, reads SO_PEERCRED (unix(7)), and passes the bytes on to the
controller's own socket, over a connection whose near end it has bound to an abstract name of 128 random bits. That name
is what gRPC calls the peer, and by it the call's user is found. Nobody else can use such a name: the controller's own
socket lies where only the owner and root get to, and these are the operator anyway.

Only those that settings.local_users names get as far as gRPC. Root and the daemon's own user are the operator here too.
"""

import asyncio
import contextlib
import grp
import os
import pwd
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from forkypig.errors import ForkyError, InvalidRequest
from forkypig.model import check_name
from forkypig.model.access import DEFAULT_TENANT, Principal, Role

log = structlog.get_logger()

_PEER = "unix-abstract:"
_NAME = "forky-peer-"
_MOST_CONNECTIONS = 256  # of one user: each takes two of our open files
_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Rule:
    uid: int | None  # of one user, or
    gid: int | None  # of whoever is in this group
    tenant: str
    role: Role


def _rule(text: str) -> _Rule:
    who, equals, what = text.partition("=")
    tenant, colon, role = what.partition(":")
    if not (who and equals and colon) or role not in {r.value for r in Role}:
        raise InvalidRequest(
            f"FORKY_LOCAL_USERS has «{text[:80]}»: it is a list of USER=TENANT:ROLE or @GROUP=TENANT:ROLE, "
            "the role viewer, user or admin"
        )
    check_name("tenant", tenant)
    try:
        if who.startswith("@"):
            return _Rule(None, grp.getgrnam(who[1:]).gr_gid, tenant, Role(role))
        return _Rule(int(who) if who.isdigit() else pwd.getpwnam(who).pw_uid, None, tenant, Role(role))
    except KeyError as error:
        raise InvalidRequest(f"FORKY_LOCAL_USERS names «{who[:80]}», whom this computer doesn't know") from error


class LocalUsers:
    """Who they are, and the socket that they come in by."""

    def __init__(self, text: str) -> None:
        """`text`: as in settings.local_users. Raises InvalidRequest."""
        self._rules = [_rule(part.strip()) for part in text.split(",") if part.strip()]
        self._connected: dict[str, Principal] = {}
        self._connections: Counter[int] = Counter()

    @property
    def any(self) -> bool:
        return bool(self._rules)

    def principal_of(self, peer: str) -> Principal | None:
        """Of a call's peer, as gRPC names it; None where it has not come by this socket."""
        return self._connected.get(peer)

    def is_ours(self, peer: str) -> bool:
        """Whether the peer says that it has come by this socket."""
        return peer.startswith(_PEER + _NAME)

    def known_as(self, uid: int, gid: int) -> Principal | None:
        """The first rule that fits counts."""
        try:
            account = pwd.getpwuid(uid)
            name, groups = account.pw_name, os.getgrouplist(account.pw_name, account.pw_gid)
        except KeyError:
            name, groups = str(uid), [gid]
        if uid in (0, os.geteuid()):
            return Principal(f"user:{name}", DEFAULT_TENANT, Role.ADMIN, operator=True)
        for rule in self._rules:
            if rule.uid == uid or (rule.gid is not None and rule.gid in groups):
                return Principal(f"user:{name}", rule.tenant, rule.role)
        return None

    @contextlib.asynccontextmanager
    async def serving(self, path: Path, inner: Path) -> AsyncIterator[None]:
        """Listens on `path` for as long as the block lasts, and passes on to `inner`."""
        if not self.any:
            yield
            return
        path.unlink(missing_ok=True)
        tasks: set[asyncio.Task[None]] = set()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            with contextlib.suppress(OSError):
                await self._serve(reader, writer, inner)

        server = await asyncio.start_unix_server(accepted, path)
        try:
            path.chmod(0o666)
            log.info("serving", socket=str(path), users=len(self._rules))
            yield
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: Path) -> None:
        pid, uid, gid = _credentials(writer.get_extra_info("socket"))
        who = self.known_as(uid, gid)
        try:
            if who is None or self._connections[uid] >= _MOST_CONNECTIONS:
                log.warning("connection refused", uid=uid, gid=gid, pid=pid)
                return
            self._connections[uid] += 1
            name = f"{_NAME}{secrets.token_hex(16)}"
            self._connected[_PEER + name] = who
            try:
                with socket.socket(socket.AF_UNIX) as near:
                    near.setblocking(False)
                    near.bind(f"\0{name}")
                    await asyncio.get_running_loop().sock_connect(near, str(inner))
                    to_inner = await asyncio.open_unix_connection(sock=near.dup())
                await _both_ways((reader, writer), to_inner)
            finally:
                self._connections[uid] -= 1
                del self._connected[_PEER + name]
        except ForkyError as error:
            log.warning("connection refused", uid=uid, error=str(error))
        finally:
            writer.close()


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end, at the moment when it connected."""
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _both_ways(one: _Stream, other: _Stream) -> None:
    """Until either ends: gRPC has no use for half of a connection."""
    ways = [asyncio.ensure_future(_one_way(one[0], other[1])), asyncio.ensure_future(_one_way(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        other[1].close()


async def _one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
