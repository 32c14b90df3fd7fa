"""The controllers that share a database: who lives, who of them reconciles, and whose an open intent is.

Each says that it lives by renewing a lease, by the database's clock. One of them leads: it alone reconciles and
collects. When its lease runs out another declares it dead, has hostd refuse its calls, and finishes or undoes what it
was at. One that was declared dead and goes on (it stood still, say) can write nothing any more: it stops what it was
at, and joins again. With SQLite there is one controller, which leads; then nothing of this costs anything.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.host import Host
from forkypig.controller.journal import Journal
from forkypig.controller.store import Store, intents, leases
from forkypig.controller.store.leases import RECONCILE, Lease
from forkypig.controller.store.standing import Standing
from forkypig.core.intents import Intent, IntentStatus
from forkypig.errors import ForkyError

log = structlog.get_logger()

# Killed, a leader is followed after at most _LIVES_S + _BEAT_S, well below 5 s; on a host whose cores are all taken a
# process gets no turn for a second now and then.
_LIVES_S = 3.0
_BEAT_S = 0.6
_POLL_S = 0.1
_DEAD = (
    "this controller stood still for too long, and another has finished or undone what was under way: see what became "
    "of it (forky ps), then try again"
)


class Peers:
    """This controller among the others."""

    def __init__(self, store: Store, journal: Journal, host: Host, name: str) -> None:
        self._store, self._journal, self._host, self.name = store, journal, host, name
        self._leads_until = 0.0  # by time.monotonic
        self._last_beat = 0.0
        self._together_since = 0.0  # since when the database has answered all the time
        self._wish = asyncio.Event()
        self._told: dict[str, int] = {}  # hostd refuses lower numbers of these
        self._left: frozenset[int] = frozenset()
        self.on_work: Callable[[], None] = lambda: None  # called when there is something to reconcile
        self.on_lead: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        """Whether this one reconciles."""
        return not self._store.is_shared or time.monotonic() < self._leads_until

    @property
    def number(self) -> int:
        """This one's fencing number; 0 with SQLite."""
        return self._store.standing.number if self._store.standing else 0

    # -- living --------------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Enters this controller. What another of the same name was at, which must have ended, is up to the leader."""
        if not self._store.is_shared:
            return
        self._store.standing = None
        async with self._store.write() as tx:
            until = await leases.now_us(tx) + int(_LIVES_S * 1e6)
            number = await leases.join(tx, self.name, until)
        self._store.standing = Standing(leases.row_of(self.name), number)
        self._host.stamp = (("forky-controller", self.name), ("forky-fencing", str(number)))
        log.info("joined", name=self.name, fencing=number)
        self._together_since = time.monotonic()
        await self._beat()

    async def leave(self) -> None:
        """The others need not wait until the lease runs out. After the journal was stopped."""
        if self._store.standing is None:
            return
        self._leads_until = 0.0
        try:
            async with self._store.beat() as tx:
                await leases.bury(tx, self.name, self.number)
        except ForkyError as error:
            log.warning("left without a word", error=str(error))

    async def run(self) -> None:
        """Beats for ever."""
        if not self._store.is_shared:
            return
        while True:
            try:
                async with asyncio.timeout(_BEAT_S):
                    await self._wish.wait()
                await asyncio.sleep(_POLL_S)  # wishes come in crowds
            except TimeoutError:
                pass
            try:
                await self._beat()
            except ForkyError as error:
                log.warning("no word to the other controllers", error=str(error))
            except Exception:  # the edge of a task that everything else relies on
                log.exception("beating failed")

    async def _beat(self) -> None:
        began = time.monotonic()
        if began - self._last_beat > _LIVES_S:
            self._together_since = began  # the others may have been without the database for as long
        led, wished = self.leads, self._wish.is_set()
        self._wish.clear()
        async with self._store.beat() as tx:
            now = await leases.now_us(tx)
            until = now + int(_LIVES_S * 1e6)
            lives = await leases.renew(tx, self.name, self.number, until)
            rows = {lease.name: lease for lease in await leases.every(tx)}
            lead = rows[RECONCILE]
            if lives and (mine := self._holds(lead)):
                await leases.take(tx, self.name, self.number, until)
            elif lives and wished:
                await leases.want(tx)
        if not lives:
            await self._rise_again()
            return
        self._last_beat = began
        if not mine:
            mine = await self._succeed(lead, now)
            led = False
        self._leads_until = began + _LIVES_S if mine else 0.0
        if mine and not led:
            log.info("leads", name=self.name, fencing=self.number)
            self.on_lead()
        elif mine and lead.is_wanted:
            self.on_work()
        await self._look_after(rows.values(), now)

    def _holds(self, lead: Lease) -> bool:
        return lead.holder == self.name and lead.number == self.number

    async def _succeed(self, lead: Lease, now: int) -> bool:
        """Takes the lead from one that left, or has not renewed it; whether it did."""
        if lead.holder not in ("", self.name) and not self._is_over(lead, now):
            return False
        until = 0
        async with self._store.write() as tx:
            [current] = [lease for lease in await leases.every(tx, locked=True) if lease.name == RECONCILE]
            if (current.holder, current.number, current.expires_us) != (lead.holder, lead.number, lead.expires_us):
                return False
            if lead.holder not in ("", self.name):
                await leases.bury(tx, lead.holder, lead.number)
                log.warning("declared dead", controller=lead.holder, fencing=lead.number)
            until = await leases.now_us(tx) + int(_LIVES_S * 1e6)
            await leases.take(tx, self.name, self.number, until)
        return True

    def _is_over(self, lease: Lease, now: int) -> bool:
        """Not when the database was away from all of us: then each has first to be given the time to say so."""
        return lease.expires_us < now and time.monotonic() - self._together_since > _LIVES_S

    async def _rise_again(self) -> None:
        """Another has declared this one dead."""
        log.warning("superseded: what was under way is up to the others", name=self.name, fencing=self.number)
        self._leads_until = 0.0
        await self._journal.stop(_DEAD)
        await self.join()

    # -- intents -------------------------------------------------------------------------------------------------------

    async def _look_after(self, rows: Iterable[Lease], now: int) -> None:
        """Gives up the intents that are not under way here any more; as the leader, looks for those that are left."""
        if not self.leads:
            async with self._store.read() as tx:
                mine = await intents.unfinished(tx, owner=self.number)
            if ended := [i for i in mine if not self._journal.is_under_way(i)]:
                async with self._store.write() as tx:
                    for intent in ended:
                        await self._release(tx, intent)
                self._wish.set()
            return
        dead = [r for r in rows if r.controller not in ("", self.name) and r.holder and self._is_over(r, now)]
        if dead:
            async with self._store.write() as tx:
                for lease in dead:
                    await leases.bury(tx, lease.controller, lease.number)
                    log.warning("declared dead", controller=lease.controller, fencing=lease.number)
        async with self._store.read() as tx:
            left, _ = await self.sorted_intents(tx)
        numbers = frozenset(intent.id for intent in left)
        if numbers - self._left:
            self.on_work()
        self._left = numbers

    async def _release(self, tx: AsyncConnection, intent: Intent) -> None:
        failed = intent.id in self._journal.failed
        await intents.release(tx, intent, IntentStatus.UNDOING if failed else intent.status)
        self._journal.failed.discard(intent.id)

    async def others_at(self, tx: AsyncConnection, thing: str) -> list[Intent]:
        """What other controllers, which live, are at with this id."""
        return (await self._sorted(tx, await intents.unfinished_about(tx, thing)))[1] if self.number else []

    async def sorted_intents(self, tx: AsyncConnection) -> tuple[list[Intent], list[Intent]]:
        """The unfinished ones: those that nobody is at, and those that another controller, which lives, is at."""
        return await self._sorted(tx, await intents.unfinished(tx))

    async def _sorted(self, tx: AsyncConnection, unfinished: list[Intent]) -> tuple[list[Intent], list[Intent]]:
        alive: set[int] = set()
        if any(intent.owner not in (None, self.number) for intent in unfinished):
            alive = await leases.living(tx) - {self.number}
        left, others = [], []
        for intent in unfinished:
            if intent.owner in alive:
                others.append(intent)
            elif not self._journal.is_under_way(intent):
                left.append(intent)
        return left, others

    # -- what the leader does for the others, and they ask of it -------------------------------------------------------

    def wish(self) -> None:
        """Asks the leader to look."""
        self._wish.set()

    async def settled(self, failed: Iterable[Intent]) -> None:
        """Returns when the leader has ended these."""
        numbers = {intent.id for intent in failed}
        self.wish()
        while True:
            async with self._store.read() as tx:
                if not numbers & {intent.id for intent in await intents.unfinished(tx)}:
                    return
            await asyncio.sleep(_POLL_S)

    async def fence_off(self) -> None:
        """Has hostd refuse the calls of those that are dead, before what they left is looked at."""
        if not self._store.is_shared:
            return
        async with self._store.read() as tx:
            rows = await leases.every(tx)
        for row in rows:
            if row.controller and self._told.get(row.controller, 0) < row.number:
                await self._host.fence(row.controller, row.number)
                self._told[row.controller] = row.number
