"""The network of one instance on one host: its bridge, its slots, its published ports.

Slots are made ahead (`ready` of them), so that `take` has one at once, and removed in batches, because the kernel waits
for all its CPUs once per removal, however many interfaces go. Everything that waits for the kernel runs in threads.
"""

import asyncio
import contextlib
import zlib
from collections import deque
from contextlib import AbstractAsyncContextManager
from ipaddress import IPv4Address, IPv4Network

import structlog

from forkypig.errors import InternalError, NotFound, NotPossibleNow, ResourceExhausted
from forkypig.model.network import NetworkPolicy, PortForward
from forkypig.net import cabling, excepted, host, links, namespace
from forkypig.net.cabling import Plan
from forkypig.net.calm import Calm
from forkypig.net.config import BRIDGE_PORTS, NetworkConfig, capacity, slot_address
from forkypig.net.conntrack import forget_machines
from forkypig.net.doctor import missing
from forkypig.net.host import Ground
from forkypig.net.netlink import NetlinkSocket
from forkypig.net.ports import PublishedPorts
from forkypig.net.slot import Slot

log = structlog.get_logger()

# Making a slot is half nft's CPU time and half the kernel's, under one lock: more at once gain nothing.
MAKERS = 2

# 16 cables are gone in 20 ms. More at once are quicker in all, but a fork may have to wait for them.
REMOVED_AT_ONCE = 16


class Fabric:
    """Makes and removes slots, and publishes ports of them. All methods are for one event loop."""

    def __init__(self, config: NetworkConfig, *, ready: int = 4) -> None:
        """Nothing happens before `open`. `ready`: how many slots are kept ahead."""
        self.config = config
        self._ready = ready
        self._ground: Ground | None = None
        self._ports = PublishedPorts(config.table)
        self._free: deque[int] = deque()  # the longest unused first: what still comes for an address finds nobody
        self._ahead: deque[asyncio.Task[Slot]] = deque()  # made, or in the making, for nobody yet
        self._slots: dict[str, Slot] = {}  # handed out
        self._found: set[int] = set()  # there when we came, nobody's yet: to be adopted or swept
        self._leaving: list[Slot] = []
        self._makers = asyncio.Semaphore(MAKERS)
        self._removal = asyncio.Lock()
        self._publishing = asyncio.Lock()
        self._calm = Calm()
        self._left: deque[NetlinkSocket] = deque()  # in namespaces that were cut off
        self._dissolving: asyncio.Task[None] | None = None

    # -- opening and closing ------------------------------------------------------------------------------------------

    @property
    def subnet(self) -> IPv4Network:
        """The addresses of the slots and of the bridge."""
        return self._opened().subnet

    @property
    def gateway(self) -> IPv4Address:
        """The address of the bridge: where the host is for machines, and where names are resolved."""
        return self._opened().gateway

    @property
    def mtu(self) -> int:
        """The largest packet, in bytes; machines should have the same."""
        return self._opened().mtu

    async def open(self) -> None:
        """Makes the network, or takes up the one that is there without any connection noticing. Twice is fine.

        Raises NotPossibleNow for what the host lacks, InvalidRequest for a clash with what it has.
        """
        if self._ground is not None:
            return
        self.config.check()
        if lacking := await asyncio.to_thread(missing):
            raise NotPossibleNow("; ".join(lacking))
        there = await asyncio.to_thread(self._indices)
        try:
            ground = await asyncio.to_thread(host.lay, self.config, in_use=bool(there))
        except OSError as error:
            raise NotPossibleNow(f"the host's side of the network could not be set up: {error}") from error
        await asyncio.to_thread(self._ports.load)
        self._ground = ground
        self._found = there
        self._free = deque(index for index in range(capacity(ground.subnet)) if index not in there)
        self._top_up()

    async def close(self, remove: bool) -> None:
        """Lets go of everything; with `remove` nothing of this instance is left, also if it was never opened."""
        async with self._removal:  # removals that are under way end first
            ahead = [task.result() for task in await self._settle() if task.exception() is None]
            while self._left:  # no fork is to come that the kernel could hold up with all of them at once
                self._left.popleft().close()
            if self._dissolving is not None:
                await asyncio.wait({self._dissolving})
            for slot in (*ahead, *self._slots.values()):
                slot.close()
            self._slots.clear()
            self._ports.close()
            if remove:
                await asyncio.to_thread(self._remove_all)
            elif ahead:
                await asyncio.to_thread(cabling.cut_off, [slot.plan for slot in ahead], self._group)
            self._ground = None

    async def _settle(self) -> list[asyncio.Task[Slot]]:
        """Waits for the slots in the making: a thread can't be told to stop, but it takes only milliseconds."""
        tasks, self._ahead = list(self._ahead), deque()
        if tasks:
            await asyncio.wait(tasks)
        return tasks

    def _remove_all(self) -> None:
        # Enough to cut them off by: addresses don't matter any more, and may not be known.
        plans = [self._plan(index, IPv4Network("0.0.0.0/32")) for index in self._indices()]
        cabling.cut_off(plans, self._group)
        host.clear(self.config)

    def _opened(self) -> Ground:
        if self._ground is None:
            raise InternalError("the network was used before it was opened")
        return self._ground

    # -- slots --------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more slots can be taken."""
        self._opened()
        return len(self._free) + len(self._ahead)

    async def take(self) -> Slot:
        """A slot with the default policy. ResourceExhausted when the subnet is used up."""
        self._opened()
        while self._ahead and self._ahead[0].done() and self._ahead[0].exception() is not None:
            self._ahead.popleft()  # its failure may be long ago: try again
        making = self._ahead.popleft() if self._ahead else self._start()
        self._top_up()
        try:
            slot = await asyncio.shield(making)
        except asyncio.CancelledError:
            self._ahead.appendleft(making)
            raise
        self._slots[slot.name] = slot
        return slot

    async def take_again(self, name: str) -> Slot:
        """The slot of this name with the default policy, made anew, for a machine that had it when the network was
        removed. NotFound when somebody else has it by now."""
        self._opened()
        index = self.config.slot_index(name)
        making = next((task for task in self._ahead if task.get_name() == f"net-slot-{index}"), None)
        if making is not None:
            self._ahead.remove(making)
        elif index is not None and index in self._free:
            self._free.remove(index)
            making = self._begin(index)
        else:
            raise NotFound("network of a machine", name, "another machine has its address now")
        self._top_up()
        slot = await making
        self._slots[slot.name] = slot
        return slot

    def _top_up(self) -> None:
        while len(self._ahead) < self._ready and self._free:
            self._ahead.append(self._start())

    def _start(self) -> "asyncio.Task[Slot]":
        ground = self._opened()
        if not self._free:
            count = capacity(ground.subnet)
            raise ResourceExhausted(
                f"the network {ground.subnet} holds {count} machines, and all are there: remove some"
                + (", or set a larger subnet (FORKY_SUBNET)" if count < BRIDGE_PORTS else "")
            )
        return self._begin(self._free.popleft())

    def _begin(self, index: int) -> "asyncio.Task[Slot]":
        task = asyncio.create_task(self._make(index), name=f"net-slot-{index}")
        task.add_done_callback(_log_failure)
        return task

    async def _make(self, index: int) -> Slot:
        plan = self._plan(index, self.subnet)
        try:
            async with self._makers, self._calm.step():
                switching = await asyncio.to_thread(cabling.build, plan)
        except BaseException as error:
            self._free.append(index)
            if isinstance(error, OSError):
                raise ResourceExhausted(f"no network namespace could be made: {error.strerror or error}") from error
            raise
        return Slot(plan, switching, NetworkPolicy())

    async def adopt(self, name: str) -> Slot:
        """A slot that an earlier hostd handed out, once. NotFound when its namespace is gone, also where one of its
        name was made ahead since, which the next machine would be given too: `take_again` gives that one."""
        index = self.config.slot_index(name)
        if index is None or index not in self._found or index >= capacity(self.subnet):
            raise NotFound("network of a machine", name, "its namespace was removed; start the machine again")
        plan = self._plan(index, self.subnet)
        try:
            switching = await asyncio.to_thread(cabling.open_inside, plan.path)
        except FileNotFoundError as error:
            raise NotFound(
                "network of a machine", name, "its namespace was removed; start the machine again"
            ) from error
        slot = Slot(plan, switching, None)
        with contextlib.suppress(NotPossibleNow):  # `check` says so
            slot.current_tap()
        self._slots[name] = slot
        self._found.discard(index)
        return slot

    async def release(self, slot: Slot) -> None:
        """Removes a slot with all that led to it; its address is free again. Twice is fine."""
        if self._slots.pop(slot.name, None) is None:
            return
        self._leaving.append(slot)
        async with self._removal:
            # Whoever comes first takes all that have come meanwhile along.
            leaving, self._leaving = self._leaving, []
            if leaving:
                everything = any(each.excepted for each in leaving)
                await self._dismiss([(each.plan, each.leave()) for each in leaving], everything=everything)

    async def sweep(self, keep: set[str]) -> None:
        """Removes what is left of slots of this instance that are neither in `keep` nor handed out."""
        kept = {self.config.slot_index(name) for name in keep | self._slots.keys()}
        async with self._removal:
            gone, self._found = self._found - kept, self._found & kept
            plans = [self._plan(index, self.subnet) for index in sorted(gone)]
            await self._dismiss([(plan, await asyncio.to_thread(_open_left, plan)) for plan in plans], everything=True)
        if gone:
            log.info("slots-swept", count=len(gone))

    async def _dismiss(self, slots: list[tuple[Plan, NetlinkSocket | None]], *, everything: bool) -> None:
        """Removes slots, each with a socket in there if it has one. `everything`: also rules of another hostd."""
        async with self._publishing:
            await asyncio.to_thread(self._forget, {plan.address for plan, _ in slots}, everything=everything)
        last = capacity(self.subnet)
        for first in range(0, len(slots), REMOVED_AT_ONCE):
            plans = [plan for plan, _ in slots[first : first + REMOVED_AT_ONCE]]
            async with self._calm.step():
                await asyncio.to_thread(cabling.cut_off, plans, self._group)
            await asyncio.to_thread(forget_machines, {plan.address for plan in plans})
            indices = (self.config.slot_index(plan.name) for plan in plans)
            self._free.extend(index for index in indices if index is not None and index < last)
        self._left.extend(inner for _, inner in slots if inner is not None)
        if self._dissolving is None or self._dissolving.done():
            self._dissolving = asyncio.create_task(self._dissolve(), name="net-dissolve")
        self._top_up()

    async def _dissolve(self) -> None:
        while self._left:
            async with self._calm.step():
                await asyncio.to_thread(cabling.dissolve, self._left.popleft())

    def _forget(self, addresses: set[IPv4Address], *, everything: bool) -> None:
        for address in addresses & self._ports.addresses():
            for forward in self._ports.of(address):
                self._ports.unpublish(address, forward)
        if everything:
            for address in addresses & excepted.excepted(self.config.table).keys():
                excepted.except_on_host(self.config.table, address, [])

    def calm(self) -> AbstractAsyncContextManager[None]:
        """For a fork's pause: in the block no slot is made or removed. Entering waits for a step under way, ≤ 50 ms.

        Nothing in the block may wait for `take` or `release`.
        """
        return self._calm.pause()

    # -- ports --------------------------------------------------------------------------------------------------------

    async def publish(self, slot: Slot, forward: PortForward) -> None:
        """Makes a port of the host lead to the machine. InvalidRequest or NotPossibleNow, naming the port, when it
        can't be had.

        Said again by every new hostd: the rule outlives it, the reservation of the port does not.
        """
        self._opened()
        async with self._publishing:
            await asyncio.to_thread(self._ports.publish, slot.address, forward)

    async def unpublish(self, slot: Slot, forward: PortForward) -> None:
        """Takes it back and ends the connections that came in by it. No error if it does not lead there."""
        self._opened()
        async with self._publishing:
            await asyncio.to_thread(self._ports.unpublish, slot.address, forward)

    def published(self, slot: Slot) -> list[PortForward]:
        """The ports that lead to the machine."""
        return self._ports.of(slot.address)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _plan(self, index: int, subnet: IPv4Network) -> Plan:
        config = self.config
        return Plan(
            name=config.slot_name(index),
            address=slot_address(subnet, index),
            subnet=subnet,
            gateway=subnet.network_address + 1,
            bridge=config.bridge,
            link=config.link_name(index),
            mtu=self._ground.mtu if self._ground is not None else config.mtu,
            host_table=config.table,
        )

    @property
    def _group(self) -> int:
        """The number under which interfaces are removed together: of this instance alone, and no round one."""
        return 0x666B0000 | zlib.crc32(self.config.instance.encode()) & 0xFFFF

    def _indices(self) -> set[int]:
        """The slots of which anything is left: a name, or a cable of a namespace that lost its name."""
        found = {self.config.slot_index(name) for name in namespace.names()}
        with NetlinkSocket() as netlink:
            found |= {self.config.link_index(link.name) for link in links.links(netlink)}
        return {index for index in found if index is not None}


def _open_left(plan: Plan) -> NetlinkSocket | None:
    """For a namespace that is to be removed; it may be gone, or its name be an empty file."""
    try:
        return cabling.open_inside(plan.path)
    except OSError:
        return None


def _log_failure(task: "asyncio.Task[Slot]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("slot-not-made", task=task.get_name(), error=str(error))
