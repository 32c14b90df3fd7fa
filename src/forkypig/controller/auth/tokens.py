"""Tokens: made, looked up, revoked.

A token is `fp_ID_SECRET`: 12 hex digits that find its row, and 256 random bits. The row holds SHA-256 of the secret. A
slow password hash would gain nothing: it makes guessing dear where there is little to guess, and nobody guesses 256
bits; and it would cost every call its time (NIST SP 800-63B, 5.1.2, asks for it only below 112 bits).
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace

import structlog

from forkypig.controller.store import Store, tenants, tokens
from forkypig.controller.store.tokens import Token
from forkypig.daemon.server import now_us
from forkypig.errors import ForkyError, InvalidRequest, NotFound, PermissionDenied
from forkypig.model import check_name
from forkypig.model.access import Principal, Role

log = structlog.get_logger()

_TOKEN = re.compile(r"fp_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NOBODY = hashlib.sha256(b"").hexdigest()
_LAST_USE_US = 60_000_000  # how exactly the last use is kept: a write for each call would cost more than the call
_LONGEST_S = 100 * 365 * 86400


class Tokens:
    """The tokens of one database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def principal_of(self, text: str) -> Principal | None:
        """Whom `text` stands for; None where it is no token that holds, whatever is wrong with it."""
        matched = _TOKEN.fullmatch(text)
        if matched is None:
            return None
        async with self._store.glance() as tx:
            token = await tokens.get(tx, matched[1])
        # One that is not there takes as long as one with another secret.
        right = hmac.compare_digest(_hash(matched[2]), token.secret_sha256 if token else _NOBODY)
        now = now_us()
        if token is None or not right or not token.holds(now):
            return None
        await self._note_use(token, now)
        return Principal(f"token:{token.id}", token.tenant, token.role)

    async def _note_use(self, token: Token, now: int) -> None:
        if now - token.last_used_us < _LAST_USE_US:
            return
        try:
            async with self._store.write() as tx:
                await tokens.used(tx, token.id, now)
        except ForkyError as error:  # a full disk, say: no reason to keep anybody out
            log.warning("last use of a token not noted", token=token.id, error=str(error))

    async def create(self, who: Principal, name: str, tenant: str, role: Role, lifetime_s: int) -> tuple[Token, str]:
        """A new token and its text, which nobody can learn later. Raises PermissionDenied, InvalidRequest,
        NotFound (the tenant)."""
        if name:
            check_name("token", name)
        tenant = check_name("tenant", tenant or who.tenant)
        if not 0 <= lifetime_s <= _LONGEST_S:
            raise InvalidRequest(f"a token can't hold for {lifetime_s} s: say up to 100 years, or 0 for ever")
        if not who.operator and (tenant != who.tenant or not who.role.includes(role)):
            raise PermissionDenied(
                f"you can make tokens of tenant «{who.tenant}» up to the role «{who.role.value}»: ask the operator"
            )
        secret, now = secrets.token_urlsafe(32), now_us()
        token = Token(
            id=secrets.token_hex(6),
            name=name,
            tenant=tenant,
            role=role,
            secret_sha256=_hash(secret),
            created_us=now,
            created_by=who.name,
            expires_us=now + lifetime_s * 1_000_000 if lifetime_s else 0,
        )
        async with self._store.write() as tx:
            if await tenants.get(tx, tenant) is None:
                raise NotFound("tenant", tenant, "see forky tenant ls")
            await tokens.add(tx, token)
        return token, f"fp_{token.id}_{secret}"

    async def every(self, who: Principal) -> Sequence[Token]:
        """Those that they may see, oldest first."""
        async with self._store.read() as tx:
            return await tokens.every(tx, None if who.operator else who.tenant)

    async def revoke(self, who: Principal, text: str) -> Token:
        """By id, or by a name that one token has. Raises NotFound, InvalidRequest (several are called so)."""
        seen = await self.every(who)
        found = [t for t in seen if t.id == text] or [t for t in seen if text and t.name == text and not t.revoked_us]
        if not found:
            raise NotFound("token", text[:63], "see forky auth token ls")
        if len(found) > 1:
            raise InvalidRequest(
                f"{len(found)} tokens are called «{text}»: say which by its id, see forky auth token ls"
            )
        now = now_us()
        async with self._store.write() as tx:
            await tokens.revoke(tx, found[0].id, now)
        return replace(found[0], revoked_us=found[0].revoked_us or now)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
