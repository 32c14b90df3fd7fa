"""RunMachine: a machine from an image, by its template in milliseconds, or really booted.

A run that its caller leaves is undone: the host's call is cancelled and the machine removed. An image or a template
that was made on the way stays.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from forkypig.controller.desk import Desk, find_snapshot
from forkypig.controller.forks import ground_of
from forkypig.controller.images import Images
from forkypig.controller.journal import Caller, Flight
from forkypig.controller.leases import check_ttl, wished
from forkypig.controller.pools.pools import Pools
from forkypig.controller.principal import principal
from forkypig.controller.quotas import admit
from forkypig.controller.store import events, intents, machines, snapshots
from forkypig.controller.templates import Templates
from forkypig.core.config import bare, changed
from forkypig.core.intents import Intent, IntentKind
from forkypig.core.limits import check_disk_holds, check_shape, with_defaults
from forkypig.core.names import free_name, pleasant_name
from forkypig.core.quotas import of_machines
from forkypig.core.reconcile import merge
from forkypig.daemon.server import now_us
from forkypig.errors import AlreadyExists, ForkyError, InvalidRequest, NotFound
from forkypig.model import (
    ConfigChange,
    ForkOptions,
    Image,
    ImageId,
    Machine,
    MachineConfig,
    MachineState,
    Progress,
    Shape,
    Snapshot,
    SnapshotId,
    check_name,
    new_machine_id,
)
from forkypig.v1 import host_pb2

ShowProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What is asked for; empty and zero fields mean the defaults."""

    image: str = ""
    name: str = ""
    shape: Shape = field(default_factory=lambda: Shape(0, 0, 0))
    cold_boot: bool = False
    change: ConfigChange = ConfigChange()  # of the default config, or of that of the snapshot's machine
    snapshot: str = ""  # to start from; then no image, shape or cold boot
    ttl_s: float = 0.0  # it is removed when it was not used for so long; 0: never


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run made."""

    machine: Machine
    ready_ms: float
    pool: str = ""  # it was taken from this one


class Runs:
    """RunMachine."""

    def __init__(self, desk: Desk, images: Images, templates: Templates, pools: Pools) -> None:
        self._desk, self._images, self._templates, self._pools = desk, images, templates, pools

    async def run(self, request: RunRequest, show: ShowProgress, caller: Caller) -> "Ran":
        """The machine, ready, and how long it took in ms. To be carried by the journal. Raises ForkyError; then the
        machine is not there, or will be gone as soon as the host can be reached again."""
        began = time.perf_counter()
        if request.name:
            check_name("machine", request.name)
        check_ttl(request.ttl_s)
        if request.snapshot:
            return await self._run_from_snapshot(request, show, caller, began)
        shape = with_defaults(request.shape)
        config = changed(MachineConfig(), request.change)
        check_shape(shape, 0)  # what is wrong anywhere is told also when the host is away
        await self._check_name_is_free(request.name)
        status = await self._desk.host.status()
        check_shape(shape, status.memory_total_mib)
        image = await caller.wait_for(self._images.find_or_build(request.image, show))
        check_disk_holds(shape, image)
        if not request.cold_boot and (ran := await self._from_pool(request, image.id, shape, None, config, caller)):
            return ran
        await self._desk.admission.refresh()
        with self._desk.journal.flight() as flight:
            machine, intent = await self._reserve(flight, request, image, shape, config)
            try:
                machine = await self._start(machine, image, status, request.cold_boot, show, caller)
                caller.check()
                ready_ms = (time.perf_counter() - began) * 1000
                await self._record(machine, intent, ready_ms)
            except ForkyError as error:
                await self._desk.undo(flight, error)
                raise
        await self._desk.reconciler.landed(machine.id)
        return Ran(machine, ready_ms)

    async def _from_pool(
        self,
        request: RunRequest,
        image: ImageId,
        shape: Shape,
        snapshot: SnapshotId | None,
        config: MachineConfig,
        caller: Caller,
    ) -> "Ran | None":
        """A machine that waits in a pool and is what is asked for; None: there is none."""
        began = time.perf_counter()
        while (live := self._pools.fitting(image, shape, snapshot)) is not None:
            machine = await self._pools.take(live, request.name, config, request.ttl_s, caller.check)
            if machine is not None:
                return Ran(machine, (time.perf_counter() - began) * 1000, live.pool.name)
        return None

    async def _run_from_snapshot(self, request: RunRequest, show: ShowProgress, caller: Caller, began: float) -> "Ran":
        desk = self._desk
        if request.image or request.cold_boot or request.shape != Shape(0, 0, 0):
            raise InvalidRequest(
                "a machine that starts from a snapshot has the image, CPUs, memory and disk of the snapshot: "
                "leave out what says otherwise"
            )
        await desk.reconciler.ensure_reachable()
        async with desk.store.read() as tx:
            snapshot = await find_snapshot(tx, request.snapshot)
            config = changed(bare((await ground_of(tx, snapshot)).config), request.change)
        ran = await self._from_pool(request, snapshot.image, snapshot.shape, snapshot.id, config, caller)
        if ran is not None:
            return ran
        await desk.admission.refresh()
        with desk.journal.flight() as flight:
            async with desk.store.write() as tx:
                snapshot = await find_snapshot(tx, request.snapshot)
                ground = await ground_of(tx, snapshot)
                machine = replace(
                    await self._new_machine(tx, request.name, snapshot.image, ground.image_name, snapshot.shape),
                    snapshot=snapshot.id,
                    parent=ground.parent,
                    config=changed(bare(ground.config), request.change),
                )
                intent = await self._write_down(tx, flight, machine, request)
            try:
                show(Progress("starting"))
                result = await caller.wait_for(desk.host.fork_snapshot(snapshot.id, [machine], ForkOptions()))
                machine = merge(machine, result.children[0].machine, {snapshot.id})
                caller.check()
                ready_ms = (time.perf_counter() - began) * 1000
                await self._record(machine, intent, ready_ms)
            except ForkyError as error:
                await desk.undo(flight, error)
                raise
        await desk.reconciler.landed(machine.id)
        return Ran(machine, ready_ms)

    async def _check_name_is_free(self, name: str) -> None:
        """Early, before an image is built for it; what counts is `_reserve`."""
        if name:
            async with self._desk.store.read() as tx:
                if await machines.by_name(tx, principal().tenant, name) is not None:
                    raise AlreadyExists("machine", name)

    async def _reserve(
        self, flight: Flight, request: RunRequest, image: Image, shape: Shape, config: MachineConfig
    ) -> tuple[Machine, Intent]:
        async with self._desk.store.write() as tx:
            machine = replace(await self._new_machine(tx, request.name, image.id, image.name, shape), config=config)
            return machine, await self._write_down(tx, flight, machine, request)

    async def _new_machine(
        self, tx: AsyncConnection, name: str, image: ImageId, image_name: str, shape: Shape
    ) -> Machine:
        tenant = principal().tenant
        if name:
            if await machines.by_name(tx, tenant, name) is not None:
                raise AlreadyExists("machine", name)
        else:
            wanted = pleasant_name((), secrets.randbelow)
            name = free_name(wanted, await machines.names(tx, tenant, wanted))
        return Machine(
            id=new_machine_id(),
            name=name,
            state=MachineState.CREATING,
            image=image,
            image_name=image_name,
            shape=shape,
            created_us=now_us(),
            tenant=tenant,
        )

    async def _write_down(self, tx: AsyncConnection, flight: Flight, machine: Machine, request: RunRequest) -> Intent:
        await admit(tx, of_machines(machine.shape, 1))
        self._desk.admission.admit(machine.shape, 1, boots=request.cold_boot)
        await machines.add(tx, [machine])
        intent = await intents.add(tx, IntentKind.RUN, machines=[machine.id], **wished(request.ttl_s))
        await events.add(tx, "machine.created", machine.id, f"{machine.name}, of {machine.image_name or machine.image}")
        return flight.take(intent)

    async def _start(
        self,
        machine: Machine,
        image: Image,
        status: host_pb2.HostStatus,
        cold_boot: bool,
        show: ShowProgress,
        caller: Caller,
    ) -> Machine:
        """On the host; returns when its agent has answered."""
        if cold_boot:
            show(Progress("booting"))
            return merge(machine, await caller.wait_for(self._desk.host.boot(machine)))
        for attempt in (1, 2):
            template = await caller.wait_for(self._templates.get(image, machine.shape, status, show))
            show(Progress("starting"))
            try:
                return await self._from_template(machine, template, caller)
            except NotFound:
                # The host has lost it: once more, with a new one.
                await self._templates.drop(template)
                if attempt == 2:
                    raise
        raise AssertionError("two attempts, and neither returned nor raised")

    async def _from_template(self, machine: Machine, template: Snapshot, caller: Caller) -> Machine:
        async with self._desk.store.write() as tx:
            if await snapshots.get(tx, template.id) is None:
                raise NotFound("snapshot", template.id, "it was removed just now; try again")
            # From here on the template can't be removed.
            await machines.set_snapshot(tx, machine.id, template.id)
        machine = replace(machine, snapshot=template.id)
        result = await caller.wait_for(self._desk.host.fork_snapshot(template.id, [machine], ForkOptions()))
        return merge(machine, result.children[0].machine, {template.id})

    async def _record(self, machine: Machine, intent: Intent, ready_ms: float) -> None:
        async with self._desk.finishing(intent, [machine]) as tx:
            await events.add(tx, "machine.running", machine.id, f"{machine.name}, after {ready_ms:.0f} ms")
