"""Machines that are made with a lease: nobody's death leaves them for ever, and what uses them keeps them."""

import math
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from forkypig import errors
from forkypig.controller.leases import Leases
from forkypig.daemon.settings import Settings
from forkypig.model import Lease, PoolId, new_machine_id
from forkypig.v1 import agent_pb2, pools_pb2
from forkypig.v1 import controller_pb2 as pb
from tests.component.controller_rig import Client, daemon, eventually, home, serving
from tests.component.fake_host import FakeHost


@pytest.fixture
def settings(database_url: str) -> Iterator[Settings]:
    with home(database_url) as made:
        yield made


async def gone(client: Client, *names: str) -> None:
    async def so() -> bool:
        return not {*names} & (await client.machines()).keys()

    await eventually(so)


@asynccontextmanager
async def used(client: Client, machine: str) -> Any:
    """Somebody is in it for as long as the block lasts."""
    call = client.agent.Exec()
    await call.write(agent_pb2.ExecRequest(start=agent_pb2.ExecStart(machine=machine, argv=["cat"], stdin=True)))
    await call.read()
    try:
        yield
    finally:
        call.cancel()


async def test_who_is_run_with_a_lease_goes_when_nobody_uses_it(client: Client, host: FakeHost) -> None:
    """However it is run, where there is no pool at all; a use right behind the answer counts."""
    began_us = time.time_ns() // 1000
    cold = await client.run("cold", cold_boot=True, ttl_s=1)
    async with used(client, "cold"):
        kept = await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="cold", tag="kept"))
        made = [await client.run("warm", ttl_s=1), await client.run("resumed", snapshot=kept.id, ttl_s=1)]
        assert all(machine.expires_us >= began_us + 1_000_000 for machine in (cold, *made))
        assert (await client.run("stays")).expires_us == 0
        await gone(client, "warm", "resumed")
        there = await client.machines()
        assert there.keys() == {"cold", "stays"}
        assert there["cold"].expires_us > cold.expires_us
        assert (await client.machine("GetMachine", "stays")).expires_us == 0
    await gone(client, "cold")
    assert (await client.events()).count("lease.expired") == 3
    with pytest.raises(errors.NotPossibleNow, match="no lease"):
        await client.pool("Renew", pools_pb2.RenewRequest(machine="stays"))


async def test_children_have_leases_of_their_own_or_none(client: Client) -> None:
    await client.run("web", ttl_s=600)
    [plain] = (await client.fork("web")).children
    assert plain.machine.expires_us == 0
    leased = await client.fork("web", 3, ttl_s=1)
    assert all(child.machine.expires_us for child in leased.children)
    async with used(client, "web-3"):
        await gone(client, "web-2", "web-4")
        assert (await client.machines()).keys() == {"web", "web-1", "web-3"}
        held = (await client.machine("GetMachine", "web")).expires_us
        await client.fork("web")  # which is a use of it, as everything is that is done to it
        forked = (await client.machine("GetMachine", "web")).expires_us
        assert held < forked
        stopped = await client.call("StopMachine", pb.StopMachineRequest(machine="web"))
        assert forked < stopped.expires_us
    await client.pool("Renew", pools_pb2.RenewRequest(machine="web", ttl_s=1))
    await gone(client, "web", "web-3")  # stopped, and left


def test_a_use_that_began_before_its_lease_was_known_here_counts() -> None:
    """Another controller has just run the machine."""
    machine, leases = new_machine_id(), Leases()
    over = Lease(machine=machine, pool=PoolId(""), pool_name="", ttl_s=60, expires_us=1)
    with leases.using(machine):
        leases.refresh([over])
        assert [lease.machine for lease in leases.used()] == [machine]
        assert not leases.over()
    leases.refresh([over])
    assert not leases.over()  # it has begun anew


@pytest.mark.parametrize("ttl_s", [0.5, -1.0, math.nan, math.inf, 31 * 86_400.0])
@pytest.mark.parametrize("database_url", [""])  # it is not asked
async def test_what_no_lease_can_be_is_told_before_anything_is_made(
    client: Client, host: FakeHost, ttl_s: float
) -> None:
    with pytest.raises(errors.InvalidRequest, match="ask for 1 s to 30 days"):
        await client.run("web", ttl_s=ttl_s)
    with pytest.raises(errors.InvalidRequest, match="ask for 1 s to 30 days"):
        await client.fork("web", ttl_s=ttl_s)
    assert not host.machines and not host.snapshots


@pytest.mark.parametrize("database_url", [""])  # what outlives what is tried of either engine elsewhere
async def test_a_lease_outlives_the_controller(settings: Settings, host: FakeHost) -> None:
    """Which is killed as soon as the caller knows of the machine."""
    async with daemon(settings) as (process, client):
        await client.run("web", ttl_s=1)
        await process.kill()
    async with serving(settings) as client:
        await gone(client, "web")
        assert not host.machines
