"""How the machines of this host are connected: each in a namespace of its own (`nat`), by QEMU's user-mode network
(`user`), or not at all (`none`); and what is done to one machine's connection.

The user-mode network takes no privileges and can do less (docs/network.md). What it can't do is refused, not ignored.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Collection
from dataclasses import replace
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import structlog

from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError, InvalidRequest, NotFound, NotPossibleNow, ResourceExhausted
from forkypig.model import MachineConfig, NetworkMode, NetworkPolicy, PortForward
from forkypig.net.apart import Apart
from forkypig.net.config import NetworkConfig
from forkypig.net.doctor import missing
from forkypig.net.fabric import Fabric
from forkypig.net.names import NameServer
from forkypig.net.slot import Slot
from forkypig.qemu import user_network

if TYPE_CHECKING:
    from forkypig.hostd.host import Host
    from forkypig.hostd.machine import LiveMachine
    from forkypig.qemu.process import Process

log = structlog.get_logger()

NAT, USER, NONE = "nat", "user", "none"
_KINDS = ("auto", NAT, USER, NONE)
_DEFAULT = NetworkPolicy()


class HostNetwork:
    """The host's side of its machines' networks."""

    def __init__(self, settings: Settings) -> None:
        """`open` says which kind it is."""
        self._settings = settings
        self.kind = NONE
        self.reason = ""
        self.fabric: Fabric | None = None
        self._names: NameServer | None = None
        self._apart: Apart | None = None

    async def open(self, host: "Host") -> None:
        """Chooses the kind and sets up what it needs; takes up what is there already. Raises InvalidRequest for
        settings that can't be, NotPossibleNow where `nat` was asked for and this host can't do it."""
        wanted = self._settings.network
        if wanted not in _KINDS:
            raise InvalidRequest(f"FORKY_NETWORK={wanted} is none that there is: use {', '.join(_KINDS)}")
        lacking = await asyncio.to_thread(missing) if wanted in ("auto", NAT) else []
        if wanted == NAT and lacking:
            raise NotPossibleNow(f"FORKY_NETWORK=nat can't be had on this host: {'; '.join(lacking)}")
        if wanted in (USER, NONE) or lacking:
            self.kind = USER if wanted == "auto" else wanted
            self.reason = f"auto: {'; '.join(lacking)}" if lacking else f"FORKY_NETWORK={wanted}"
            return
        config = network_config(self._settings)
        fabric = Fabric(config)
        await fabric.open()
        self.kind, self.fabric = NAT, fabric
        self._apart = Apart(config.table, config.link_prefix)
        self.reason = f"{'asked for' if wanted == NAT else 'auto'}: bridge {config.bridge}, subnet {fabric.subnet}"
        names = NameServer(config, host.address_of, policy_of=host.policy_of, name_of=host.name_of)
        try:
            await names.open(fabric.gateway, fabric.subnet)
        except ForkyError as error:
            log.error("machines can't look up names", error=str(error))
        else:
            self._names = names

    async def close(self, *, remove: bool) -> None:
        """`remove`: nothing of it is left; else machines go on with their networks."""
        if self._names is not None:
            await self._names.close()
            self._names = None
        if self.fabric is not None:
            await self.fabric.close(remove)
            if remove:
                self.fabric = None

    @property
    def hardware(self) -> str:
        """What a machine's network card hangs on: for qemu.command.Hardware."""
        return "tap" if self.kind == NAT else self.kind

    def calm(self) -> contextlib.AbstractAsyncContextManager[None]:
        """For a split's pause: in the block nothing else is done to the host's network."""
        return self.fabric.calm() if self.fabric is not None else contextlib.nullcontext()

    # -- slots -------------------------------------------------------------------------------------------------------

    def check_room(self, count: int) -> None:
        """Raises ResourceExhausted when there are no addresses for `count` more machines."""
        if self.fabric is not None:
            room = self.fabric.room()
            if count > room:
                raise ResourceExhausted(
                    f"{count} more machines need an address each and the subnet {self.fabric.subnet} has {room} left: "
                    "remove machines, or give a larger one with FORKY_SUBNET and forky down, up"
                )

    async def take(self) -> Slot | None:
        """A namespace for a machine; None where machines have none."""
        return await self.fabric.take() if self.fabric is not None else None

    async def release(self, slot: Slot | None) -> None:
        if slot is not None and self.fabric is not None:
            await self.fabric.release(slot)

    async def adopt(self, name: str) -> Slot | None:
        """A machine's slot of before; None when it is gone."""
        if not name or self.fabric is None:
            return None
        try:
            return await self.fabric.adopt(name)
        except NotFound:
            log.info("a machine's network namespace is gone", slot=name)
            return None

    async def again(self, name: str, config: MachineConfig) -> Slot | None:
        """A machine's slot of before, made anew after it went with the host's network (a reboot, `forky down`): the
        machine keeps its address. Its ports come with `sweep`. None where that can't be."""
        if not name or self.fabric is None:
            return None
        try:
            slot = await self.fabric.take_again(name)
            await slot.apply(config.network)
        except ForkyError as error:
            log.error("a machine gets another address", slot=name, error=str(error))
            return None
        return slot

    async def join(self, slot: Slot | None, tenant: str) -> None:
        """Before a machine runs in there: it reaches those of its tenant, and nobody else's. Raises NotPossibleNow."""
        if slot is not None and self._apart is not None:
            await self._apart.join(slot.address, tenant)

    async def hand_over(self, config: MachineConfig, old: "Process", new: "Process") -> None:
        """Before a split's pause: published ports of the user-mode network go from one process to the other."""
        if self.kind == USER and config.ports:
            bare = replace(config, ports=())
            await user_network.configure(old.session, config, bare)
            await user_network.configure(new.session, bare, config)

    async def hand_back(self, config: MachineConfig, old: "Process", new: "Process") -> None:
        """Undoes `hand_over`; the new process may have ended."""
        if self.kind == USER and config.ports:
            bare = replace(config, ports=())
            with contextlib.suppress(ForkyError):
                await user_network.configure(new.session, config, bare)
            try:
                await user_network.configure(old.session, bare, config)
            except ForkyError as error:
                log.error("published ports are lost after a failed fork", process=old.id, error=str(error))

    def point(self, live: "LiveMachine") -> None:
        """Sees to it that packets for a machine go to the process that runs it."""
        if live.slot is None:
            return
        try:
            live.slot.switch(live.record.process_id)
        except NotPossibleNow as error:
            log.error("a machine is cut off from its network", machine=live.id, error=str(error))

    async def sweep(self, machines: Collection["LiveMachine"]) -> None:
        """After adoption: what belongs to none of the machines goes (slots of shells, mostly)."""
        if self.fabric is None:
            return
        await self.fabric.sweep({live.slot.name for live in machines if live.slot is not None})
        if self._apart is not None:
            try:
                await self._apart.all_are({m.slot.address: m.tenant for m in machines if m.slot is not None})
            except ForkyError as error:  # what an earlier hostd said is in force
                log.error("tenants' networks are not kept apart anew", error=str(error))
        for live in machines:
            if live.slot is None:
                continue
            for port in live.record.machine.config.ports:
                try:
                    await self.fabric.publish(live.slot, port)  # ours already: the port is only reserved again
                except ForkyError as error:
                    log.error("a published port is lost", machine=live.id, port=str(port), error=str(error))

    async def renew(self, live: "LiveMachine") -> None:
        """Before a stopped machine starts: a slot that was damaged meanwhile is mended, or else given up."""
        if live.slot is None:
            return
        live.slot.at_no_port()
        try:
            await live.slot.check()
        except NotPossibleNow:
            try:
                await live.slot.repair()
            except ForkyError as error:
                log.warning("a machine gets a new network namespace", machine=live.id, why=str(error))
                await give_up(self, live)

    # -- one machine's connection ------------------------------------------------------------------------------------

    def check_possible(self, config: MachineConfig) -> None:
        """Raises NotPossibleNow for what this kind of network can't do."""
        policy = config.network
        if self.kind == NAT:
            return
        asked = {
            "--network isolated": policy.mode is NetworkMode.ISOLATED,
            "--egress": policy.egress != _DEFAULT.egress,
            "--bandwidth": policy.bandwidth_bytes_s is not None,
            "-p": bool(config.ports) and self.kind == NONE,
        }
        if impossible := [option for option, is_asked in asked.items() if is_asked]:
            raise NotPossibleNow(
                f"{' and '.join(impossible)} can't be had with the {self.kind} network ({self.reason}): "
                "run the daemons as root with FORKY_NETWORK=nat"
            )

    async def configure(
        self, slot: Slot | None, process: "Process | None", was: MachineConfig | None, now: MachineConfig
    ) -> None:
        """Makes a machine's connection what `now` says. `was`: what it is; None: as `take` gave it.

        On failure it is what it was, as far as it could be put back. Raises InvalidRequest (a port in use) and more."""
        self.check_possible(now)
        before = was or MachineConfig()
        if self.kind == USER:
            if process is not None:
                await user_network.configure(process.session, before, now)
            return
        if slot is None or self.fabric is None:
            return
        done: list[PortForward] = []
        if now.network != before.network:
            await slot.apply(now.network)
        try:
            for port in now.ports:
                if port not in before.ports:
                    await self.fabric.publish(slot, port)
                    done.append(port)
            for port in before.ports:
                if port not in now.ports:
                    await self.fabric.unpublish(slot, port)
        except (ForkyError, OSError):
            for port in done:
                await self.fabric.unpublish(slot, port)
            if now.network != before.network:
                await slot.apply(before.network)
            raise

    async def change(self, live: "LiveMachine", was: MachineConfig, now: MachineConfig) -> None:
        """As `configure`, for a machine that is there: one that has no network now gets it with its next start."""
        if live.slot is None and self.kind == NAT and live.process is not None and was != now:
            raise NotPossibleNow(
                f"machine «{live.name}» has lost its network namespace: forky stop {live.name} and forky start "
                f"{live.name} give it a new one"
            )
        if live.slot is not None:
            await live.slot.check()
        await self.configure(live.slot, live.process, was, now)


def instance_of(settings: Settings) -> str:
    """A short name for this home, in names that the whole host shares."""
    return hashlib.blake2s(str(settings.home).encode(), digest_size=4).hexdigest()


def network_config(settings: Settings) -> NetworkConfig:
    """What the settings say. Raises InvalidRequest for a subnet that is none."""
    instance = instance_of(settings)
    subnet: IPv4Network | None = None
    if settings.subnet != "auto":
        try:
            subnet = IPv4Network(settings.subnet)
        except ValueError as error:
            raise InvalidRequest(f"FORKY_SUBNET={settings.subnet}: {error}; write one like 10.112.0.0/20") from error
    return NetworkConfig(
        instance=instance,
        bridge=settings.bridge or f"fk-{instance}",
        subnet=subnet,
        mtu=settings.mtu,
        nameservers=tuple(server for server in settings.nameservers.split(",") if server),
        state=settings.network_state,
    )


async def give_up(network: HostNetwork, live: "LiveMachine") -> None:
    """The machine is removed: its namespace goes, and with it its address and its ports."""
    slot, live.slot = live.slot, None
    await network.release(slot)
