"""forkypig.v1.Auth: who the caller is, the tokens, the audit log."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import grpc

from forkypig.controller.audit import AuditLog
from forkypig.controller.auth.tokens import Tokens
from forkypig.controller.principal import principal
from forkypig.controller.store.tokens import Token
from forkypig.errors import InvalidRequest
from forkypig.model.access import Role
from forkypig.v1 import auth_pb2 as pb
from forkypig.v1 import auth_pb2_grpc
from forkypig.v1 import common_pb2 as common
from forkypig.wire.edge import answered, streamed

_Context = grpc.aio.ServicerContext[Any, Any]


class AuthServicer(auth_pb2_grpc.AuthServicer):
    """See auth.proto."""

    def __init__(self, tokens: Tokens, audit: AuditLog) -> None:
        self._tokens, self._audit = tokens, audit

    @answered
    async def WhoAmI(self, request: common.Empty, context: _Context) -> pb.WhoAmIResponse:
        who = principal()
        return pb.WhoAmIResponse(name=who.name, tenant=who.tenant, role=who.role.value, operator=who.operator)

    @answered
    async def CreateToken(self, request: pb.CreateTokenRequest, context: _Context) -> pb.CreateTokenResponse:
        role = _role(request.role)
        made, secret = await self._tokens.create(principal(), request.name, request.tenant, role, request.lifetime_s)
        return pb.CreateTokenResponse(token=_token(made), secret=secret)

    @answered
    async def ListTokens(self, request: common.Empty, context: _Context) -> pb.ListTokensResponse:
        return pb.ListTokensResponse(tokens=[_token(token) for token in await self._tokens.every(principal())])

    @answered
    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: _Context) -> pb.Token:
        return _token(await self._tokens.revoke(principal(), request.token))

    @streamed
    async def ReadAudit(self, request: pb.ReadAuditRequest, context: _Context) -> AsyncGenerator[pb.AuditEntry, None]:
        who = principal()
        async with aclosing(self._audit.read(request.since_us, follow=request.follow)) as entries:
            async for entry in entries:
                if who.operator or entry.tenant == who.tenant:
                    yield pb.AuditEntry(**asdict(entry))


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError as error:
        raise InvalidRequest(f"«{text[:40]}» is no role: viewer, user or admin") from error


def _token(token: Token) -> pb.Token:
    fields = {**asdict(token), "role": token.role.value}
    del fields["secret_sha256"]
    return pb.Token(**fields)
