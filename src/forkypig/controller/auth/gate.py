"""Who a call comes from, by what came with it: a token, a certificate, or the socket that it came in by.

A token counts wherever it is sent; it is what somebody means to be. Without one, over TCP a certificate of our
authority counts, over Unix sockets the user. The controller's own socket is 0600 in a directory that is 0700: only the
owner and root can connect, as the kernel sees to, and these are the operator.
"""

from collections.abc import Mapping

from forkypig.certificates.presented import Watched
from forkypig.controller.auth.attempts import Attempts, place_of
from forkypig.controller.auth.local_users import LocalUsers
from forkypig.controller.auth.tokens import Tokens
from forkypig.controller.principal import in_tenant
from forkypig.controller.store import Store, tenants
from forkypig.errors import NotFound, Unauthenticated
from forkypig.model.access import DEFAULT_TENANT, Principal, Role

OPERATOR = Principal("operator", DEFAULT_TENANT, Role.ADMIN, operator=True)
_SCHEME = "bearer "


class Gate:
    """Knows all ways in."""

    def __init__(
        self, store: Store, tokens: Tokens, certificates: Watched, local_users: LocalUsers, attempts: Attempts
    ) -> None:
        self._store = store
        self._tokens, self._certificates, self._local_users = tokens, certificates, local_users
        self._attempts = attempts

    def peer_of(self, peer: str, metadata: Mapping[str, str]) -> str:
        """Where a call comes from: `peer`, as gRPC names it, or what the REST API says whom it calls for. Only the
        operator's processes reach our own socket, so nobody else is believed."""
        own = peer.startswith("unix") and not self._local_users.is_ours(peer)
        said = metadata.get("forky-peer", "")
        return said[:100] if own and said.startswith(("ipv4:", "ipv6:")) else peer

    async def who(self, metadata: Mapping[str, str], peer: str, certificate: bytes | None = None) -> Principal:
        """`metadata`: the call's, keys in lower case; `peer`: as gRPC names it; `certificate`: PEM, found to be of our
        authority by TLS. Raises Unauthenticated, without saying why; TooManyRequests where that was too often;
        PermissionDenied for another's tenant, NotFound for one that the operator names and that is not there."""
        credentials, place = metadata.get("authorization", ""), place_of(self.peer_of(peer, metadata))
        counts = place.startswith(("ipv4:", "ipv6:"))  # over our Unix sockets the kernel has said who it is
        if counts:
            self._attempts.check(place, credentials)
        found = await self._found(metadata, peer, certificate)
        if found is None:
            if counts:
                self._attempts.failed(place, credentials)
            raise Unauthenticated
        if counts:
            self._attempts.succeeded(place, credentials)
        who = in_tenant(found, metadata.get("forky-tenant", ""))
        if who.tenant != DEFAULT_TENANT:
            async with self._store.glance() as tx:
                there = await tenants.get(tx, who.tenant) is not None
            if not there:
                # Whose token or certificate outlives their tenant is nobody any more.
                raise NotFound("tenant", who.tenant, "see forky tenant ls") if who.operator else Unauthenticated()
        return who

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
