"""Who may come in, and what they did: the part of `Forky` that is about tokens and the audit log."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from forkypig.model.access import AuditEntry, Principal, Role
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import QUICK_S, calls, translated
from forkypig.v1 import auth_pb2 as pb
from forkypig.v1 import auth_pb2_grpc, common_pb2

if TYPE_CHECKING:
    from forkypig.v1.auth_pb2_grpc import AuthAsyncStub

_EMPTY = common_pb2.Empty()


@dataclass(frozen=True, slots=True)
class Token:
    """A token, without its secret. Times are µs since the Unix epoch, 0 for never."""

    id: str
    name: str
    tenant: str
    role: Role
    created_us: int
    created_by: str
    expires_us: int
    last_used_us: int  # to the minute
    revoked_us: int


class Access:
    """The part of `Forky` that is about who may come in."""

    socket: Endpoint

    @property
    def channel(self) -> grpc.aio.Channel:
        """The open channel."""
        raise NotImplementedError

    @property
    def _auth(self) -> "AuthAsyncStub":
        return auth_pb2_grpc.AuthStub(self.channel)

    async def whoami(self) -> Principal:
        """Who the controller takes us for."""
        with calls(self.socket):
            answer = await self._auth.WhoAmI(_EMPTY, timeout=QUICK_S)
        return Principal(answer.name, answer.tenant, Role(answer.role), answer.operator)

    async def create_token(
        self, role: Role, *, tenant: str = "", lifetime_s: int = 0, name: str = ""
    ) -> tuple[Token, str]:
        """A new token and its text, which is told this once. `tenant` "" is ours, `lifetime_s` 0 is for ever.

        Raises PermissionDenied (a role above ours, another tenant), InvalidRequest."""
        request = pb.CreateTokenRequest(role=role.value, tenant=tenant, lifetime_s=lifetime_s, name=name)
        with calls(self.socket):
            answer = await self._auth.CreateToken(request, timeout=QUICK_S)
        return _token(answer.token), answer.secret

    async def tokens(self) -> Sequence[Token]:
        """Of our tenant, for the operator of all; oldest first."""
        with calls(self.socket):
            answer = await self._auth.ListTokens(_EMPTY, timeout=QUICK_S)
        return [_token(token) for token in answer.tokens]

    async def revoke_token(self, token: str) -> Token:
        """By id, or by a name that one token has; holds from the next call on. Raises NotFound, InvalidRequest."""
        with calls(self.socket):
            return _token(await self._auth.RevokeToken(pb.RevokeTokenRequest(token=token), timeout=QUICK_S))

    async def audit(self, *, since_us: int = 0, follow: bool = False) -> AsyncIterator[AuditEntry]:
        """What was done in our tenant, for the operator in all; oldest first. `follow`: and what is being done."""
        request = pb.ReadAuditRequest(since_us=since_us, follow=follow)
        call = self._auth.ReadAudit(request, timeout=None if follow else QUICK_S)
        async for e in translated(self.socket, call):
            yield AuditEntry(e.time_us, e.who, e.tenant, e.role, e.method, e.about, e.result, e.duration_ms, e.peer)


def _token(message: pb.Token) -> Token:
    return Token(
        id=message.id,
        name=message.name,
        tenant=message.tenant,
        role=Role(message.role),
        created_us=message.created_us,
        created_by=message.created_by,
        expires_us=message.expires_us,
        last_used_us=message.last_used_us,
        revoked_us=message.revoked_us,
    )
