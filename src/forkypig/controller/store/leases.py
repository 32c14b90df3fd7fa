"""Rows of leases: which controllers share the database, until when each is believed to live, and who reconciles.

Every controller has a row, `controller/NAME`, whose fencing number it got when it joined: it owns its intents by that
number, and its calls to hostd carry it. A row without a holder is of one that left, or that was declared dead: its
number is one more than the dead one's. Times are the database's.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.store.tables import leases as table

RECONCILE = "reconcile"
_CONTROLLER = "controller/"
# Of the database's server, whatever the transaction's beginning; only databases that are shared have leases.
_NOW = text("SELECT (extract(epoch from clock_timestamp()) * 1000000)::bigint")


@dataclass(frozen=True, slots=True)
class Lease:
    """One row."""

    name: str
    holder: str  # "": nobody
    number: int
    expires_us: int
    is_wanted: bool

    @property
    def controller(self) -> str:
        """The name of the controller whose row it is; "" for RECONCILE."""
        return self.name.removeprefix(_CONTROLLER) if self.name.startswith(_CONTROLLER) else ""


def row_of(controller: str) -> str:
    """The name of a controller's own row."""
    return _CONTROLLER + controller


async def now_us(connection: AsyncConnection) -> int:
    return int((await connection.execute(_NOW)).scalar_one())


async def every(connection: AsyncConnection, *, locked: bool = False) -> list[Lease]:
    """All rows. `locked`: nobody else changes them until the transaction ends."""
    asked = select(table).order_by(table.c.name)
    rows = await connection.execute(asked.with_for_update() if locked else asked)
    return [Lease(r.name, r.holder, r.fencing, r.expires_us, r.wanted) for r in rows]


async def living(connection: AsyncConnection) -> set[int]:
    """The numbers of the controllers that nobody declared dead."""
    mine = (table.c.name != RECONCILE) & (table.c.holder != "")
    return set((await connection.execute(select(table.c.fencing).where(mine))).scalars())


async def join(connection: AsyncConnection, controller: str, until_us: int) -> int:
    """Enters a controller and returns its number, higher than any before. One of the same name is superseded."""
    # By the clock too: a database that was put back from a backup must not give a number for the second time.
    highest = (await connection.execute(select(func.max(table.c.fencing)))).scalar_one() or 0
    number = max(int(highest) + 1, await now_us(connection))
    await _put(connection, row_of(controller), controller, number, until_us)
    if (await connection.execute(select(table.c.name).where(table.c.name == RECONCILE))).first() is None:
        await _put(connection, RECONCILE, "", 0, 0)
    return number


async def _put(connection: AsyncConnection, name: str, holder: str, number: int, until_us: int) -> None:
    values: dict[str, Any] = {"holder": holder, "fencing": number, "expires_us": until_us, "wanted": False}
    done = await connection.execute(update(table).where(table.c.name == name).values(values))
    if done.rowcount == 0:
        await connection.execute(insert(table).values({"name": name, **values}))


async def renew(connection: AsyncConnection, controller: str, number: int, until_us: int) -> bool:
    """False: it was declared dead, or another one took its name."""
    same = (table.c.name == row_of(controller)) & (table.c.fencing == number) & (table.c.holder == controller)
    return (await connection.execute(update(table).where(same).values(expires_us=until_us))).rowcount == 1


async def take(connection: AsyncConnection, controller: str, number: int, until_us: int) -> None:
    """From here on this controller reconciles; nothing is wanted of it any more."""
    await _put(connection, RECONCILE, controller, number, until_us)


async def bury(connection: AsyncConnection, controller: str, number: int) -> None:
    """Declares a controller dead: what it writes from here on is refused. It may join again."""
    same = (table.c.name == row_of(controller)) & (table.c.fencing == number)
    await connection.execute(update(table).where(same).values(holder="", fencing=number + 1, expires_us=0))
    held = (table.c.name == RECONCILE) & (table.c.holder == controller) & (table.c.fencing == number)
    await connection.execute(update(table).where(held).values(holder="", expires_us=0))


async def want(connection: AsyncConnection) -> None:
    """Asks whoever reconciles to look."""
    await connection.execute(update(table).where(table.c.name == RECONCILE).values(wanted=True))
