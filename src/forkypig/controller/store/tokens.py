"""Rows of tokens. No secret is in them, only the hash of one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import tokens as table
from forkypig.model.access import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as it is remembered. Times are µs since the Unix epoch, 0 for never."""

    id: str
    name: str
    tenant: str
    role: Role
    secret_sha256: str  # hex
    created_us: int
    created_by: str
    expires_us: int = 0
    last_used_us: int = 0
    revoked_us: int = 0

    def holds(self, now_us: int) -> bool:
        """Whether it is neither revoked nor expired."""
        return not self.revoked_us and (not self.expires_us or now_us < self.expires_us)


def _token(row: Any) -> Token:
    values = {name: getattr(row, name) for name in Token.__dataclass_fields__}
    return Token(**{**values, "role": Role(row.role)})


async def add(connection: AsyncConnection, token: Token) -> None:
    await connection.execute(insert(table).values({**asdict(token), "role": token.role.value}))


async def get(connection: AsyncConnection, number: str) -> Token | None:
    """By its id."""
    row = (await connection.execute(select(table).where(table.c.id == number))).one_or_none()
    return _token(row) if row is not None else None


async def every(connection: AsyncConnection, tenant: str | None) -> Sequence[Token]:
    """Of one tenant, or of all (None), oldest first."""
    query = select(table).order_by(table.c.created_us, table.c.id)
    rows = await connection.execute(query if tenant is None else query.where(table.c.tenant == tenant))
    return [_token(row) for row in rows]


async def revoke(connection: AsyncConnection, number: str, now_us: int) -> None:
    """From now on, unless it was revoked before."""
    await connection.execute(
        update(table).where(table.c.id == number, table.c.revoked_us == 0).values(revoked_us=now_us)
    )


async def used(connection: AsyncConnection, number: str, now_us: int) -> None:
    await connection.execute(update(table).where(table.c.id == number).values(last_used_us=now_us))
