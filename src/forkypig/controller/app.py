"""Puts the controller together and runs it: database, host, reconciler, collector, services."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc

from forkypig.controller import names_file
from forkypig.controller.admission import Admission
from forkypig.controller.agent import AgentServicer
from forkypig.controller.auth.local_users import LocalUsers
from forkypig.controller.auth.servicer import AuthServicer
from forkypig.controller.changes import Changes
from forkypig.controller.collector import Collector
from forkypig.controller.desk import Desk
from forkypig.controller.edge.access import Access
from forkypig.controller.forks import Forks
from forkypig.controller.health import Health
from forkypig.controller.host import Host
from forkypig.controller.images import Images
from forkypig.controller.journal import Journal
from forkypig.controller.leases import Leases
from forkypig.controller.observing.metrics import Metrics
from forkypig.controller.observing.scraping import serving
from forkypig.controller.observing.servicer import ObservationServicer
from forkypig.controller.observing.usage import Usage
from forkypig.controller.peers import Peers
from forkypig.controller.pools.pools import Pools
from forkypig.controller.pools.servicer import PoolServicer
from forkypig.controller.reconciler import Reconciler
from forkypig.controller.runs import Runs
from forkypig.controller.servicer import ControllerServicer, Operations
from forkypig.controller.store import Store
from forkypig.controller.store_service import StoreServicer
from forkypig.controller.tags import Tags
from forkypig.controller.templates import Templates
from forkypig.controller.tenants import Tenants
from forkypig.controller.tenants_service import TenantsServicer
from forkypig.daemon.server import now_us, serve
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.v1 import (
    agent_pb2_grpc,
    auth_pb2_grpc,
    controller_pb2_grpc,
    observe_pb2_grpc,
    pools_pb2_grpc,
    store_pb2_grpc,
    tenants_pb2_grpc,
)

SERVICES = tuple(
    f"forkypig.v1.{name}" for name in ("Controller", "Agent", "Store", "Pools", "Observation", "Tenants", "Auth")
)


class _Ended(Exception):
    """The controller is told to end: cancels what is under way in its task group."""


@dataclass(frozen=True, slots=True)
class App:
    """A controller that works, whether or not it serves."""

    desk: Desk
    operations: Operations
    pools: Pools
    access: Access
    usage: Usage
    metrics: Metrics
    stop: asyncio.Event

    @property
    def interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        """What every call passes first."""
        return (self.access.edge,)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the services to a gRPC server."""
        controller = ControllerServicer(self.desk, self.operations)
        controller_pb2_grpc.add_ControllerServicer_to_server(controller, server)
        agent = AgentServicer(self.desk.store, self.desk.host, self.desk.admission, self.desk.leases)
        agent_pb2_grpc.add_AgentServicer_to_server(agent, server)
        pools_pb2_grpc.add_PoolsServicer_to_server(PoolServicer(self.pools), server)
        store_pb2_grpc.add_StoreServicer_to_server(StoreServicer(self.desk), server)
        observation = ObservationServicer(self.desk.store, self.usage, self.metrics)
        observe_pb2_grpc.add_ObservationServicer_to_server(observation, server)
        auth_pb2_grpc.add_AuthServicer_to_server(AuthServicer(self.access.tokens, self.access.audit), server)
        tenants_pb2_grpc.add_TenantsServicer_to_server(TenantsServicer(Tenants(self.desk)), server)


@contextlib.asynccontextmanager
async def controller(settings: Settings) -> AsyncIterator[App]:
    """A controller for as long as the block lasts. At its end operations stop where they are: their intents are open,
    and the next controller goes on from there. Raises ForkyError where the database can't be opened."""
    local_users = LocalUsers(settings.local_users)  # what is wrong with it is told first
    store = await Store.open(settings.database_url or settings.database)
    host = Host(settings.hostd_socket)
    access = Access(settings, store, local_users)
    failure: ForkyError | None = None
    try:
        async with serving(settings, host.measured.registry, access), asyncio.TaskGroup() as tasks:
            journal = Journal(tasks)
            peers = Peers(store, journal, host, settings.name_of_controller)
            await peers.join()
            leases = Leases()
            reconciler = Reconciler(store, host, journal, peers, leases)
            admission = Admission(settings, store, host)
            desk = Desk(store, host, journal, reconciler, peers, admission, leases)
            collector = Collector(desk)
            images = Images(desk, collector)
            forks, templates = Forks(desk), Templates(desk)
            changes = Changes(desk, forks)
            pools = Pools(desk, changes, images, templates)
            operations = Operations(
                runs=Runs(desk, images, templates, pools),
                forks=forks,
                changes=changes,
                collector=collector,
                tags=Tags(desk),
                images=images,
                health=Health(desk, settings, now_us()),
            )
            tasks.create_task(reconciler.run())
            tasks.create_task(collector.run())
            tasks.create_task(admission.run(operations.changes.put_to_sleep))
            tasks.create_task(peers.run())
            tasks.create_task(names_file.keep(store, settings.names_file))
            usage = Usage(desk)
            metrics = Metrics(usage, host.measured.registry)
            tasks.create_task(pools.run())
            try:
                yield App(desk, operations, pools, access, usage, metrics, asyncio.Event())
            except ForkyError as error:
                failure = error  # of its own, not one of a group
            await journal.stop()
            await peers.leave()
            raise _Ended
    except* _Ended:
        pass
    finally:
        await host.close()
        await access.close()
        await store.close()
    if failure is not None:
        raise failure


async def run(settings: Settings) -> None:
    """Serves until SIGTERM."""
    async with (
        controller(settings) as app,
        app.access.local_users.serving(settings.users_socket, settings.socket("controller")),
    ):
        await serve(
            settings,
            "controller",
            app.register,
            SERVICES,
            before_stop=app.desk.journal.stop,
            stop=app.stop,
            interceptors=app.interceptors,
            bind=app.access.bind,
        )
