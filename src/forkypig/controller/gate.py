"""Who a call comes from, by what came with it: a token, a certificate, or the socket that it came in by.

A token counts wherever it is sent; it is what somebody means to be. Without one, over TCP a certificate of our
authority counts, over Unix sockets the user. The controller's own socket is 0600 in a directory that is 0700: only the
owner and root can connect, as the kernel sees to, and these are the operator.
"""

from collections.abc import Mapping
from dataclasses import replace

from forkypig.certificates.presented import Watched
from forkypig.controller.local_users import LocalUsers
from forkypig.controller.tokens import Tokens
from forkypig.errors import PermissionDenied, Unauthenticated
from forkypig.model import check_name
from forkypig.model.access import DEFAULT_TENANT, Principal, Role

OPERATOR = Principal("operator", DEFAULT_TENANT, Role.ADMIN, operator=True)
_SCHEME = "bearer "


class Gate:
    """Knows all ways in."""

    def __init__(self, tokens: Tokens, certificates: Watched, local_users: LocalUsers) -> None:
        self._tokens, self._certificates, self._local_users = tokens, certificates, local_users

    async def who(self, metadata: Mapping[str, str], peer: str, certificate: bytes | None = None) -> Principal:
        """`metadata`: the call's, keys in lower case; `peer`: as gRPC names it; `certificate`: PEM, found to be of our
        authority by TLS. Raises Unauthenticated, without saying why; PermissionDenied for another's tenant."""
        found = await self._found(metadata, peer, certificate)
        if found is None:
            raise Unauthenticated
        return _in_tenant(found, metadata.get("forky-tenant", ""))

    async def _found(self, metadata: Mapping[str, str], peer: str, certificate: bytes | None) -> Principal | None:
        if (credentials := metadata.get("authorization")) is not None:
            if not credentials.lower().startswith(_SCHEME):
                return None
            return await self._tokens.principal_of(credentials[len(_SCHEME) :].strip())
        if certificate is not None:
            return self._certificates.principal_of(certificate)
        if not peer.startswith("unix"):
            return None
        return self._local_users.principal_of(peer) if self._local_users.is_ours(peer) else OPERATOR


def _in_tenant(who: Principal, tenant: str) -> Principal:
    """The operator acts in the tenant that they name; all others in their own."""
    if not tenant or tenant == who.tenant:
        return who
    if not who.operator:
        raise PermissionDenied(f"you belong to tenant «{who.tenant}»: only the operator can act in another")
    return replace(who, tenant=check_name("tenant", tenant))
