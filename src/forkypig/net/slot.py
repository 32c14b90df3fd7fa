"""A slot: the network namespace of one machine, and what is done to it while the machine lives.

`cabling` makes and mends what is in it; the rules are those of `rules`. See docs/network.md for the picture.
"""

import asyncio
import os
import socket
from contextlib import AbstractContextManager
from ipaddress import IPv4Address
from pathlib import Path

import structlog

from forkypig.errors import InvalidRequest, NotPossibleNow, ResourceExhausted
from forkypig.model.network import NetworkPolicy
from forkypig.net import cabling, links, namespace, nftables, rules
from forkypig.net.cabling import Plan
from forkypig.net.config import GUEST_MAC
from forkypig.net.excepted import except_on_host
from forkypig.net.netlink import NetlinkError, NetlinkSocket
from forkypig.net.tap import Remainder, Tap, keep_waiting, open_tap

log = structlog.get_logger()


class Slot:
    """One machine's namespace. `Fabric` makes and removes these."""

    def __init__(self, plan: Plan, switching: NetlinkSocket, applied: NetworkPolicy | None) -> None:
        """`switching` is a socket of the namespace; `applied` the policy that is in force, None if not known."""
        self._plan = plan
        self.name = plan.name
        self.address: IPv4Address = plan.address
        self.path: Path = plan.path
        self._switching = switching
        self._messages: dict[str, bytes] = {}
        self._current: str | None = None
        self._applied = applied
        self._changing = asyncio.Lock()

    @property
    def plan(self) -> Plan:
        """What it is made of."""
        return self._plan

    @property
    def excepted(self) -> bool:
        """Whether the host may hold rules for this machine alone."""
        return self._applied is None or bool(rules.host_exceptions(self._applied))

    def close(self) -> None:
        """Lets go of it; the namespace stays."""
        self._switching.close()

    def leave(self) -> NetlinkSocket:
        """Lets go of it, for its removal: gives the socket in there."""
        return self._switching

    def inside(self) -> AbstractContextManager[None]:
        """For a worker thread: what it starts within the block lives in there. NotPossibleNow if it is gone."""
        return _Inside(self.path, self.name)

    # -- taps ---------------------------------------------------------------------------------------------------------

    async def open_tap(self, name: str | None = None) -> Tap:
        """A new tap at the machine's bridge, up, to which nothing is sent until `switch` names it.

        `name`: at most 15 bytes; without one the kernel chooses.
        """
        tap, message = await asyncio.to_thread(self._open_tap, name)
        self._messages[tap.name] = message
        return tap

    def _open_tap(self, name: str | None) -> tuple[Tap, bytes]:
        with self.inside():
            try:
                tap = open_tap(name)
            except OSError as error:
                raise ResourceExhausted(f"no tap could be made in {self.name}: {error.strerror}") from error
            try:
                with NetlinkSocket() as netlink:
                    index = socket.if_nametoindex(tap.name)
                    bridge = _index(rules.BRIDGE, self.name)
                    netlink.request(
                        links.change_link(index, mtu=self._plan.mtu),
                        links.change_link(index, master=bridge, up=True),
                        links.quiet_port(index),
                    )
                keep_waiting(tap.name)
            except BaseException as error:
                os.close(tap.fd)
                if isinstance(error, NetlinkError):
                    raise NotPossibleNow(f"a tap could not join the bridge of {self.name}: {error.strerror}") from error
                raise
        return tap, links.point_mac_at(index, GUEST_MAC)

    async def remainder(self, old_fd: int, successor: str) -> Remainder:
        """For the moment when the QEMU that reads `old_fd` (which is taken over) has stopped, see there."""
        return await asyncio.to_thread(self._remainder, old_fd, successor)

    def _remainder(self, old_fd: int, successor: str) -> Remainder:
        with self.inside():
            try:
                return Remainder(old_fd, successor)
            except OSError as error:
                raise ResourceExhausted(f"no way to {successor} in {self.name}: {error.strerror}") from error

    def switch(self, tap: str) -> None:
        """From now on the machine is at this port. Synchronous: one message to the kernel, in a fork's pause.

        Packets for the machine wait in that tap's queue until somebody reads it.
        """
        message = self._messages.get(tap)
        if message is None:
            message = links.point_mac_at(self._port(tap), GUEST_MAC)
        try:
            self._switching.request(message)
        except OSError as error:
            raise NotPossibleNow(f"{self.name} can't switch to {tap}: {error.strerror or error}") from error
        self._current = tap

    def current_tap(self) -> str:
        """The port at which the machine is. NotPossibleNow when nothing says so."""
        ports = links.ports_of_mac(self._switching, GUEST_MAC)
        found = [link.name for link in links.links(self._switching) if link.index in ports]
        if len(found) != 1:
            raise NotPossibleNow(f"no port of {self.name} is the machine's: it must be started again")
        self._current = found[0]
        return found[0]

    def at_no_port(self) -> None:
        """The machine's process has ended, and its tap with it: where the machine ought to be is not known."""
        self._current = None

    def _port(self, name: str) -> int:
        for link in links.links(self._switching):
            if link.name == name:
                return link.index
        raise NotPossibleNow(f"there is no port «{name}» in {self.name}")

    # -- policy -------------------------------------------------------------------------------------------------------

    async def apply(self, policy: NetworkPolicy) -> None:
        """Puts a policy in force, the rules of it all at once; open connections that it forbids are cut."""
        if policy.bandwidth_bytes_s is not None and policy.bandwidth_bytes_s <= 0:
            raise InvalidRequest("a bandwidth must be at least one byte per second; leave it out for no limit")
        async with self._changing:
            if policy == self._applied:
                return
            before, self._applied = self._applied, None  # not known, should a step fail
            try:
                await asyncio.to_thread(self._apply, before, policy)
            except OSError as error:
                raise NotPossibleNow(f"the policy of {self.name} could not be changed: {error}") from error
            self._applied = policy

    def _apply(self, before: NetworkPolicy | None, policy: NetworkPolicy) -> None:
        plan = self._plan
        hosts = rules.host_exceptions(policy)
        if before is None or hosts or rules.host_exceptions(before):
            except_on_host(plan.host_table, plan.address, hosts)
        with self.inside():
            if before is None or rules.differ(before, policy):
                nftables.load(cabling.slot_rules(plan, policy))
            if before is None or before.bandwidth_bytes_s != policy.bandwidth_bytes_s:
                with NetlinkSocket() as netlink:
                    _limit(netlink, rules.UPLINK, policy.bandwidth_bytes_s, plan.mtu)
        if before is None or before.bandwidth_bytes_s != policy.bandwidth_bytes_s:
            with NetlinkSocket() as netlink:
                _limit(netlink, plan.link, policy.bandwidth_bytes_s, plan.mtu)

    # -- health -------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """NotPossibleNow, naming what is missing, when somebody took something away from under the machine."""
        faults = await asyncio.to_thread(self._faults)
        if faults:
            raise NotPossibleNow(f"the network of {self.name} is broken: {'; '.join(faults)}")

    def _faults(self) -> list[str]:
        try:
            if namespace.identity(self.path) != namespace.identity_of_socket(self._switching.fileno()):
                return [f"{self.path} is another namespace than it was"]
        except FileNotFoundError:
            return [f"its namespace {self.path} was removed"]
        faults = cabling.faults_outside(self._plan)
        with self.inside():
            faults += cabling.faults_inside(self._plan, self._current)
        return faults

    async def repair(self) -> None:
        """Puts back what is missing and can be; then as `check`."""
        async with self._changing:
            try:
                await asyncio.to_thread(self._repair, self._applied)
            except OSError as error:
                raise NotPossibleNow(f"the network of {self.name} could not be mended: {error}") from error
            self._messages.clear()  # the numbers of interfaces may have changed
            if self._current is not None:
                self.switch(self._current)
        await self.check()

    def _repair(self, policy: NetworkPolicy | None) -> None:
        try:
            intact = namespace.identity(self.path) == namespace.identity_of_socket(self._switching.fileno())
        except FileNotFoundError:
            namespace.name_again(self.path, self._switching.fileno())
            intact = True
            log.warning("slot-named-again", slot=self.name)
        if not intact:
            raise NotPossibleNow(f"{self.path} is another namespace than it was: remove it, then try again")
        policy = policy or NetworkPolicy()
        cabling.furnish(self._plan, policy)
        self._apply(None, policy)
        log.info("slot-repaired", slot=self.name)


class _Inside:
    """`namespace.inside` with an error that names the slot."""

    def __init__(self, path: Path, name: str) -> None:
        self._entered = namespace.inside(path)
        self._name = name

    def __enter__(self) -> None:
        try:
            self._entered.__enter__()
        except OSError as error:
            raise NotPossibleNow(f"the network namespace of {self._name} is gone") from error

    def __exit__(self, *details: object) -> bool | None:
        return self._entered.__exit__(*details)  # type: ignore[arg-type]


def _index(name: str, slot: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise NotPossibleNow(f"the interface {name} of {slot} is gone") from error


def _limit(netlink: NetlinkSocket, name: str, bytes_s: int | None, mtu: int) -> None:
    try:
        index = socket.if_nametoindex(name)
    except OSError as error:
        raise NotPossibleNow(f"the interface {name} is gone, so its bandwidth can't be limited") from error
    if bytes_s is None:
        links.unlimit_rate(netlink, index)
    else:
        netlink.request(links.limit_rate(index, bytes_s, mtu))
