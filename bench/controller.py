"""What the controller costs: per call, listing, and a thousand calls at once; on SQLite and on PostgreSQL.

The host is that of the component tests, which answers at once, so that what is measured is the controller.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc

from bench.processes import cpu_ms
from bench.session import Session
from forkypig.controller.store import Store, machines
from forkypig.daemon.settings import Settings
from forkypig.model import ImageId, Machine, MachineId, MachineState, Shape
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.v1 import host_pb2, host_pb2_grpc
from forkypig.wire.keys import KEY, NEW
from tests.component.controller_rig import Client, daemon, eventually, home, running_host
from tests.component.fake_host import IMAGE, RUNNING, FakeHost
from tests.component.postgres_rig import postgres

SECTION = "controller"
CALLS = ("get", "pause", "pause with an idempotency key")
_MACHINES = 10_000
_PAGE = 100
_AT_ONCE = 1000
_IDLE_MS = 100.0  # of CPU time in a second
_SETTLE_S = 120.0  # ten thousand machines are compared and written


async def run(session: Session) -> None:
    await _measure(session, "SQLite", "")
    with postgres(durable=True) as server:
        await _measure(session, "PostgreSQL", server.url("postgres"))


async def _measure(session: Session, engine: str, database_url: str) -> None:
    async with AsyncExitStack() as stack:
        settings = stack.enter_context(home(database_url))
        host = await stack.enter_async_context(running_host(settings))
        await _fill(settings, host)
        direct = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{settings.socket('hostd')}"))
        # Before there is a controller: one would see what changes without it, and compare everything.
        floor = await _floor(session, host_pb2_grpc.HostStub(direct))
        ran, client = await stack.enter_async_context(daemon(settings))
        await eventually(lambda: _is_packed(client), _SETTLE_S)
        assert ran.process is not None
        await _is_idle(ran.process.pid)
        await _adds(session, engine, client, floor)
        await _lists(session, engine, client)
        await _at_once(session, engine, client)


async def _fill(settings: Settings, host: FakeHost) -> None:
    """Ten thousand machines, in the records and on the host."""
    shape = Shape(1, 512, 2048)
    made = [
        Machine(
            id=MachineId(f"m-{number:012x}"),
            name=f"web-{number}",
            state=MachineState.RUNNING,
            image=ImageId(IMAGE.id),
            image_name=IMAGE.name,
            shape=shape,
            created_us=1_700_000_000_000_000 + number,
            accelerator="tcg",
        )
        for number in range(_MACHINES)
    ]
    for machine in made:
        wire = common.Shape(cpus=1, memory_mib=512, disk_mib=2048)
        host._machine(machine.id, machine.name, RUNNING, image=machine.image, shape=wire)
    store = await Store.open(settings.database_url or settings.database)
    try:
        async with store.write() as tx:
            await machines.add(tx, made)
    finally:
        await store.close()


async def _is_packed(client: Client) -> bool:
    """Whether the controller has compared everything: it knows the processes then."""
    answer = await client.call("ListMachines", pb.ListMachinesRequest(page_size=1))
    return bool(answer.machines[0].qemu_pid)


async def _is_idle(pid: int) -> None:
    """Waits until it has done what there was to do after it began: it uses no more than a tenth of a core."""
    async with asyncio.timeout(_SETTLE_S):
        before = cpu_ms(pid)
        while True:
            await asyncio.sleep(1.0)
            now = cpu_ms(pid)
            if now - before < _IDLE_MS:
                return
            before = now


async def _floor(session: Session, host: Any) -> float:
    """What a change takes without a controller, in ms: the median of pausing and resuming."""
    machine = host_pb2.HostMachineRequest(machine=f"m-{77:012x}")
    repeat = session.times(300, 50) // 2
    taken = await _in_turns(repeat, lambda: host.PauseMachine(machine), lambda: host.ResumeMachine(machine))
    return sorted(taken)[len(taken) // 2]


async def _adds(session: Session, engine: str, client: Client, floor_ms: float) -> None:
    repeat, asked = session.times(300, 50), pb.MachineRequest(machine="web-77")
    get = await _timed(repeat, lambda: client.stub.GetMachine(asked))
    session.tell(session.results.add(SECTION, "adds", "ms", get, engine=engine, call="get"))
    for call, metadata in zip(CALLS[1:], (_no_key, _new_key), strict=True):
        through = await _in_turns(
            repeat // 2,
            lambda metadata=metadata: client.stub.PauseMachine(asked, metadata=metadata()),
            lambda metadata=metadata: client.stub.ResumeMachine(asked, metadata=metadata()),
        )
        adds = [took - floor_ms for took in through]
        session.tell(session.results.add(SECTION, "adds", "ms", adds, engine=engine, call=call))


def _no_key() -> Sequence[tuple[str, str]]:
    return ()


def _new_key() -> Sequence[tuple[str, str]]:
    """As the SDK says it in a call's first attempt."""
    key = uuid.uuid4().hex
    return ((KEY, key), (NEW, key))


async def _in_turns(
    repeat: int, pause: Callable[[], Awaitable[Any]], resume: Callable[[], Awaitable[Any]]
) -> list[float]:
    taken = []
    for _ in range(repeat):
        taken += await _timed(1, pause)
        taken += await _timed(1, resume)
    return taken


async def _lists(session: Session, engine: str, client: Client) -> None:
    first = await client.call("ListMachines", pb.ListMachinesRequest(page_size=_MACHINES // 2))
    tokens = ["", first.next_page_token]
    taken = []
    for token in tokens:
        asked = pb.ListMachinesRequest(page_size=_PAGE, page_token=token)
        taken += await _timed(session.times(100, 20), lambda asked=asked: client.stub.ListMachines(asked))
    session.tell(session.results.add(SECTION, "listing 100 of 10,000 machines", "ms", taken, engine=engine))


async def _at_once(session: Session, engine: str, client: Client) -> None:
    """Half of them read, half of them change a machine each."""

    async def one(number: int) -> None:
        asked = pb.MachineRequest(machine=f"web-{number}")
        await (client.stub.GetMachine if number % 2 else client.stub.PauseMachine)(asked, timeout=120)

    began = time.perf_counter()
    ended = await asyncio.gather(*(one(number) for number in range(1000, 1000 + _AT_ONCE)), return_exceptions=True)
    took_s = time.perf_counter() - began
    failed = [error for error in ended if isinstance(error, BaseException)]
    for error in failed[:3]:
        session.results.notes.append(f"{SECTION}, {engine}, of 1000 calls at once: {error}")
    session.tell(
        session.results.add(SECTION, "of 1000 calls at once failed", "calls", [float(len(failed))], engine=engine)
    )
    session.tell(session.results.add(SECTION, "1000 calls at once", "s", [took_s], engine=engine))


async def _timed(repeat: int, call: Callable[[], Awaitable[Any]]) -> list[float]:
    """In ms."""
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - began) * 1000)
    return taken
