"""Machines of different tenants on one bridge: they don't reach each other, and can't tell that there is somebody."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from forkypig.net.apart import Apart
from forkypig.net.fabric import Fabric
from forkypig.net.slot import Slot
from tests.component.net_rig import World, ask, ip, make_world, needs_root, ping, unheard

pytestmark = needs_root


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as made:
        yield made
        assert made.leftovers() == []


@dataclass
class Machine:
    """A machine with a server on port 80."""

    slot: Slot
    guest: str


@dataclass
class Town:
    """Four machines: two of red, one of blue, one of the default tenant."""

    apart: Apart
    machines: dict[str, Machine]

    async def reaches(self, one: str, other: str) -> bool:
        address = str(self.machines[other].slot.address)
        guest = self.machines[one].guest
        await asyncio.to_thread(ask, guest, address, 80)
        return await asyncio.to_thread(ping, guest, address)

    async def is_cut_off(self, one: str, other: str) -> bool:
        return await asyncio.to_thread(unheard, self.machines[one].guest, str(self.machines[other].slot.address))

    def neighbours(self, one: str) -> str:
        """What the machine's slot has learned of others' hardware addresses."""
        return ip("neigh", "show", "dev", "up0", inside=self.machines[one].slot.name)


@pytest_asyncio.fixture
async def town(world: World) -> AsyncIterator[Town]:
    fabric = Fabric(world.config(), ready=0)
    await fabric.open()
    try:
        made = Town(Apart(fabric.config.table, fabric.config.link_prefix), {})
        for name in ("red", "red-2", "blue", "plain"):
            slot = await fabric.take()
            guest = world.guest(slot)
            world.echo(guest, 80)
            made.machines[name] = Machine(slot, guest)
        yield made
    finally:
        await fabric.close(remove=True)


TENANTS = {"red": "red", "red-2": "red", "blue": "blue", "plain": "default"}


async def test_only_those_of_ones_own_tenant_are_there(town: Town) -> None:
    assert await town.reaches("red", "blue"), "before anybody is anybody's, they reach each other"
    for name, tenant in TENANTS.items():
        await town.apart.join(town.machines[name].slot.address, tenant)
    ip("neigh", "flush", "all", inside=town.machines["red"].slot.name)
    ip("neigh", "flush", "all", inside=town.machines["plain"].slot.name)
    assert await town.reaches("red", "red-2")
    assert await town.reaches("red-2", "red")
    for one, other in (("red", "blue"), ("red", "plain"), ("plain", "red")):
        assert await town.is_cut_off(one, other), (one, other)
        told = town.neighbours(one).split(str(town.machines[other].slot.address))[-1].splitlines()[0]
        assert "lladdr" not in told, "its address looks like one that nobody has"

    # A hostd that comes anew says all of it again; a machine that goes gives its address to another tenant's.
    addresses = {town.machines[name].slot.address: tenant for name, tenant in TENANTS.items()}
    again = Apart(town.apart._table, town.apart._ports)
    await again.all_are(addresses)
    assert await town.reaches("red", "red-2")
    assert await town.is_cut_off("blue", "red")
    await again.join(town.machines["red-2"].slot.address, "default")
    assert await town.reaches("plain", "red-2")
    assert await town.is_cut_off("red", "red-2")
