"""Who gets in: tokens, roles, certificates, other users of the computer; over real sockets and real TLS."""

import time
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from forkypig import errors
from forkypig.controller.app import SERVICES
from forkypig.controller.auth import roles
from forkypig.controller.edge import edge
from forkypig.controller.store import tenants
from forkypig.controller.store import tokens as rows
from forkypig.daemon.settings import Settings
from forkypig.model.access import Role
from forkypig.v1 import auth_pb2 as pb
from forkypig.v1 import common_pb2, controller_pb2, observe_pb2, observe_pb2_grpc
from forkypig.wire.status import rpc_errors
from tests.component.access_rig import Caller, Served, serving
from tests.component.controller_rig import home, running_host


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    with home() as settings:
        async with running_host(settings), serving(settings) as made:
            yield made


def test_every_method_of_every_service_says_who_may_call_it() -> None:
    pool = descriptor_pool.Default()
    reflection = "grpc.reflection.v1alpha.ServerReflection"
    offered = {
        f"/{service}/{method.name}"
        for service in (*SERVICES, reflection)
        for method in pool.FindServiceByName(service).methods
    }
    assert offered == set(roles.LEAST)


async def test_a_token_is_its_tenants_and_its_role(served: Served) -> None:
    async with served.client(await served.token("user", "acme", name="ci")) as caller:
        who = await caller.auth("WhoAmI")
        assert (who.tenant, who.role, who.operator) == ("acme", "user", False)
        assert who.name.startswith("token:")
    async with served.client() as operator:
        assert (await operator.auth("WhoAmI")).operator
        (token,) = (await operator.auth("ListTokens")).tokens
        assert (token.name, token.tenant, token.role, token.created_by) == ("ci", "acme", "user", "operator")
        assert token.last_used_us > 0
    async with served.client(forky_tenant="other") as operator:
        with pytest.raises(errors.NotFound, match="tenant"):
            await operator.auth("WhoAmI")
        await served.tenant("other")
        assert (await operator.auth("WhoAmI")).tenant == "other"


async def test_roles_suffice_or_not(served: Served) -> None:
    async with served.client(await served.token("viewer")) as viewer:
        await viewer.call("ListMachines")
        with pytest.raises(errors.PermissionDenied, match=r"Fork takes the role «user» and you have «viewer»"):
            await viewer.call("Fork", controller_pb2.ForkRequest(source="web", count=1))
        with pytest.raises(errors.PermissionDenied, match="role «admin»"):
            await viewer.auth("ListTokens")
    async with served.client(await served.token("admin")) as admin:
        with pytest.raises(errors.PermissionDenied, match="operator"):
            await admin.call("Doctor")
        with pytest.raises(errors.PermissionDenied, match="«acme»"):
            await admin.auth("CreateToken", pb.CreateTokenRequest(role="user", tenant="other"))
        made = await admin.auth("CreateToken", pb.CreateTokenRequest(role="viewer"))
        assert made.token.tenant == "acme"
        with pytest.raises(errors.InvalidRequest, match="no role"):
            await admin.auth("CreateToken", pb.CreateTokenRequest(role="god"))
    await served.token("user", "other", name="theirs")
    async with served.client(await served.token("admin")) as admin:
        assert {token.tenant for token in (await admin.auth("ListTokens")).tokens} == {"acme"}
        with pytest.raises(errors.NotFound):
            await admin.auth("RevokeToken", pb.RevokeTokenRequest(token="theirs"))
    async with served.client(await served.token("admin"), forky_tenant="other") as admin:
        with pytest.raises(errors.PermissionDenied, match="of no other"):
            await admin.call("ListMachines")


async def test_a_token_ends_with_its_tenant(served: Served) -> None:
    async with served.client(await served.token("admin", "short-lived")) as caller:
        await caller.auth("WhoAmI")
        async with served.app.desk.store.write() as tx:
            await tenants.delete_one(tx, "short-lived")
        with pytest.raises(errors.Unauthenticated):
            await caller.auth("WhoAmI")
        await served.tenant("short-lived")  # another of the same name
        with pytest.raises(errors.Unauthenticated):
            await caller.auth("WhoAmI")
    async with served.client() as operator:
        with pytest.raises(errors.NotFound, match="tenant «nowhere»"):
            await operator.auth("CreateToken", pb.CreateTokenRequest(role="user", tenant="nowhere"))


async def test_a_revoked_token_ends_with_the_next_call(served: Served) -> None:
    text = await served.token(name="ci")
    async with served.client(text) as caller, served.client() as operator:
        await caller.call("ListMachines")
        assert (await operator.auth("RevokeToken", pb.RevokeTokenRequest(token="ci"))).revoked_us > 0
        with pytest.raises(errors.Unauthenticated):
            await caller.call("ListMachines")


async def test_a_revoked_token_ends_what_is_open(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "LOOKED_UP_AGAIN_S", 0.02)
    follow = observe_pb2.FollowEventsRequest(follow=True)
    gone, stays = await served.token(name="gone"), await served.token(name="stays")
    async with served.client(gone) as revoked, served.client(stays) as other, served.client() as operator:
        ending, lasting = (
            observe_pb2_grpc.ObservationStub(caller.channel).FollowEvents(follow, **caller.options)
            for caller in (revoked, other)
        )
        await other.run_all("web")
        async for event in ending:
            if event.kind == "machine.running":
                break
        await operator.auth("RevokeToken", pb.RevokeTokenRequest(token="gone"))
        with pytest.raises(errors.Unauthenticated), rpc_errors():
            async for _ in ending:
                pass
        assert (await anext(aiter(lasting))).sequence > 0
        assert not lasting.done()
        lasting.cancel()
    log = await served.audit_with("UNAUTHENTICATED")
    assert "FollowEvents" in next(line for line in log.splitlines() if "UNAUTHENTICATED" in line)


async def test_tokens_that_do_not_hold_are_refused_alike(served: Served) -> None:
    good = await served.token()
    expired = await served.token(lifetime_s=3600)
    async with served.app.desk.store.write() as tx:
        await tx.exec_driver_sql(
            f"UPDATE tokens SET expires_us = {int(time.time() * 1e6) - 1} WHERE id = '{expired[3:15]}'"
        )
    other_secret = good[:-1] + ("A" if good[-1] != "A" else "B")
    unknown = f"fp_{'0' * 12}_{good[16:]}"
    said = set()
    for bad in (expired, other_secret, unknown, "x", "fp_", good + "x", good.upper(), "fp_" + "a" * 4000):
        async with served.client(bad) as caller:
            with pytest.raises(errors.Unauthenticated) as caught:
                await caller.call("ListMachines")
            said.add(str(caught.value))
    async with served.client(authorization="Basic YTpi") as caller:
        with pytest.raises(errors.Unauthenticated) as caught:
            await caller.call("ListMachines")
    assert said == {str(caught.value)}
    assert "forky auth token create" in str(caught.value)


async def test_ten_megabytes_of_token(served: Served) -> None:
    async with served.client("fp_" + "a" * 10_000_000) as caller:
        with pytest.raises(errors.ForkyError):
            await caller.call("ListMachines")
    async with served.client(await served.token()) as caller:
        await caller.call("ListMachines")


async def test_a_secret_is_stored_nowhere(served: Served) -> None:
    text = await served.token()
    async with served.client(text) as caller:
        await caller.call("ListMachines")
        with pytest.raises(errors.PermissionDenied):
            await caller.auth("RevokeToken", pb.RevokeTokenRequest(token=text))
    secret = text.split("_", 2)[2].encode()
    files = [path for path in served.settings.home.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert secret not in path.read_bytes(), path
    async with served.app.desk.store.read() as tx:
        (row,) = await rows.every(tx, "acme")
    assert row.role is Role.USER
    await served.audit_with(text[3:15])  # but it says which token came


async def test_health_is_open_and_reflection_is_not() -> None:
    with home() as plain:
        settings = Settings(home=plain.home, listen="127.0.0.1:0")
        async with (
            running_host(settings),
            serving(settings) as served,
            _plain(served) as channel,
        ):
            with pytest.raises(errors.Unauthenticated):
                await Caller(channel).call("ListMachines")
            await Caller(channel, await served.token()).call("ListMachines")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await _reflected(channel, [])
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            said = await _reflected(channel, Caller(channel, await served.token("viewer")).metadata)
            assert "forkypig.v1.Controller" in said
            # The rig has no health service: unknown, and not refused.
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_log_ins_that_fail_too_often_are_not_looked_up() -> None:
    wrong = f"fp_0123456789ab_{'x' * 43}"
    with home(listen="127.0.0.1:0", failed_logins_per_minute=3) as settings:
        async with running_host(settings), serving(settings) as served, _plain(served) as channel:
            known, late = await served.token("viewer"), await served.token("viewer")
            await Caller(channel, known).call("ListMachines")
            for _ in range(3):
                with pytest.raises(errors.Unauthenticated):
                    await Caller(channel, wrong).call("ListMachines")
            for token in (wrong, late):
                with pytest.raises(errors.TooManyRequests) as told:
                    await Caller(channel, token).call("ListMachines")
                assert 0 < told.value.retry_after_s <= 20
            await Caller(channel, known).call("ListMachines")  # others behind its address do not keep it out
            # Over our own socket what the REST API says of its callers counts, and nobody else is counted.
            async with served.client(late) as operator:
                await operator.call("ListMachines")
            async with served.client(late, forky_peer="ipv4:127.0.0.1:9") as rest:
                with pytest.raises(errors.TooManyRequests):
                    await rest.call("ListMachines")
            # Elsewhere nobody is believed about where they are.
            with pytest.raises(errors.TooManyRequests):
                await Caller(channel, wrong, forky_peer="ipv4:192.0.2.1:9").call("ListMachines")
            assert "192.0.2.1" not in await served.audit_with('"ipv4:127.0.0.1:9"')


async def test_a_token_for_metrics_reads_them_and_nothing_else(served: Served) -> None:
    request = pb.CreateTokenRequest(role="metrics")
    async with served.client(await served.token("admin")) as admin:
        with pytest.raises(errors.PermissionDenied):  # it shows all tenants' machines
            await admin.auth("CreateToken", request)
    async with served.client() as operator:
        text = (await operator.auth("CreateToken", request)).secret
    async with served.client(text) as prometheus:
        stub = observe_pb2_grpc.ObservationStub(prometheus.channel)
        assert "forky_machines" in (await stub.GetMetrics(common_pb2.Empty(), metadata=prometheus.metadata)).text
        for call in (prometheus.call("ListMachines"), prometheus.auth("WhoAmI")):
            with pytest.raises(errors.PermissionDenied, match="you have «metrics»"):
                await call
    assert "GetMetrics" not in await served.audit_with("ListMachines", "WhoAmI")


def _plain(served: Served) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{served.ports[0]}")


async def _reflected(channel: grpc.aio.Channel, metadata: list[tuple[str, str]]) -> str:
    async def asking() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return str([answer async for answer in stub.ServerReflectionInfo(asking(), metadata=metadata, timeout=10)])
