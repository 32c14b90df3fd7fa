"""Keeps an eye on the host's memory: who may have more of it, whether refills may go on, who is put to sleep."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import structlog

from forkypig.controller.counted import counted
from forkypig.controller.host import Host
from forkypig.controller.principal import acting, for_tenant
from forkypig.controller.store import Store, machines
from forkypig.core.admission import (
    HostMemory,
    Level,
    Seen,
    check_admission,
    idle_longest,
    level,
    look,
    reckoned_mib,
)
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.model import MachineId, MachineState, Shape

log = structlog.get_logger()

_CALM_S, _TIGHT_S = 5.0, 1.0  # between looks
_FRESH_S = 0.5  # an answer as old as that is believed
# What was admitted has been touched by then, and is in what the host measures.
_PROMISED_S = 5.0
_LOOK_S = 3.0  # hostd reads a few files

Hibernate = Callable[[MachineId], Awaitable[object]]


class Admission:
    """The host's memory as the controller sees it."""

    def __init__(self, settings: Settings, store: Store, host: Host) -> None:
        self._store, self._host = store, host
        self._overcommit = settings.overcommit
        self._idle_s = settings.hibernate_idle_s
        self._memory = HostMemory()
        self._looked_s = float("-inf")
        self._turn = asyncio.Lock()
        self._promises: list[tuple[float, int]] = []  # until when, MiB
        self._seen: dict[str, Seen] = {}
        self._in_use: Counter[str] = Counter()  # machines that somebody is in
        self._level = Level.CALM

    @property
    def level(self) -> Level:
        """How tight memory is, as of the last look."""
        return self._level

    @property
    def refills_allowed(self) -> bool:
        """Whether machines may be made ahead of being asked for."""
        return self._level is Level.CALM

    async def refresh(self) -> None:
        """Looks at the host, unless that was done a moment ago. One that can't be asked is left to the call that needs
        it: nothing is known then, and nothing refused for it."""
        async with self._turn:
            if time.monotonic() - self._looked_s >= _FRESH_S:
                await self._look()

    async def _look(self) -> None:
        try:
            answer = await self._host.pressure(_LOOK_S)
        except ForkyError:
            self._memory = HostMemory()
            self._level = Level.CALM
            return
        now = self._looked_s = time.monotonic()
        self._memory = HostMemory(
            answer.memory_total_mib, answer.memory_available_mib, answer.some_percent, answer.full_percent
        )
        self._seen = look(self._seen, {each.machine: each.cpu_s for each in answer.machines}, now)
        for machine in self._in_use:
            if (was := self._seen.get(machine)) is not None:
                self._seen[machine] = Seen(was.cpu_s, was.at_s, now)
        if (now_level := level(self._memory)) is not self._level:
            log.info("memory", was=self._level.value, now=now_level.value, available_mib=self._memory.available_mib)
            self._level = now_level

    def admit(self, shape: Shape, count: int, *, boots: bool = False) -> None:
        """After `refresh`. Raises ResourceExhausted where the host has no room for `count` more machines; else they are
        reckoned with from here on."""
        now = time.monotonic()
        self._promises = [(until, mib) for until, mib in self._promises if until > now]
        needed = reckoned_mib(shape, count, self._overcommit, boots=boots)
        check_admission(self._memory, sum(mib for _, mib in self._promises), needed)
        self._promises.append((now + _PROMISED_S, needed))

    @contextlib.contextmanager
    def using(self, machine: str) -> Iterator[None]:
        """In the block somebody is in the machine: it is not idle."""
        try:
            with counted(self._in_use, machine):
                yield
        finally:
            if (was := self._seen.get(machine)) is not None:
                self._seen[machine] = Seen(was.cpu_s, was.at_s, time.monotonic())

    async def run(self, hibernate: Hibernate) -> None:
        """Looks for ever, and puts idle machines to sleep while memory is short, one at a time."""
        while True:
            await asyncio.sleep(_CALM_S if self._level is Level.CALM else _TIGHT_S)
            try:
                await self.refresh()
                if self._level is Level.PRESSED and self._idle_s > 0:
                    await self._relieve(hibernate)
            except ForkyError as error:
                log.warning("memory is short, and a machine could not be hibernated", error=str(error))
            except Exception:  # the edge of a task
                log.exception("looking after the host's memory failed")

    async def _relieve(self, hibernate: Hibernate) -> None:
        async with self._store.read() as tx:
            running = {str(m.id): m for m in await machines.every(tx) if m.state is MachineState.RUNNING}
        candidates = [machine for machine in running if machine not in self._in_use]
        for machine in idle_longest(self._seen, candidates, time.monotonic(), self._idle_s)[:1]:
            log.info("memory is short: an idle machine hibernates", machine=machine)
            with acting(for_tenant(running[machine].tenant)):
                await hibernate(running[machine].id)
