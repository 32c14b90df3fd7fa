"""The table of errors and gRPC status is total, and an error comes through a real call as what it was."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forkypig import errors
from forkypig.wire import status


def _all(root: type[errors.ForkyError]) -> set[type[errors.ForkyError]]:
    return {root}.union(*(_all(c) for c in root.__subclasses__()))


def test_every_error_has_a_status() -> None:
    every = _all(errors.ForkyError)
    assert {error for error in every if error.__module__ == "forkypig.errors"} == set(status.STATUS)


class _Failing(health_pb2_grpc.HealthServicer):
    error: BaseException

    async def Check(self, request: object, context: object) -> None:  # noqa: N802
        await status.abort(context, self.error)


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound("machine", "web", "see forky ps"),
        errors.Busy("machine «web»", "forking"),
        errors.AlreadyExists("machine", "web"),
        errors.GuestUnresponsive("no answer"),
        errors.HostUnreachable("gone"),
        errors.TooManyRequests(0.25),
        errors.Unauthenticated(),
        errors.PermissionDenied("you may not"),
    ],
)
async def test_errors_come_through_as_they_were(error: errors.ForkyError) -> None:
    raised = await _through_a_call(error)
    assert type(raised) is type(error)
    assert str(raised) == str(error)


async def test_a_defect_tells_its_kind_but_not_its_insides() -> None:
    raised = await _through_a_call(ValueError("secret"))
    assert type(raised) is errors.InternalError
    assert "ValueError" in str(raised)
    assert "secret" not in str(raised)


async def test_a_kind_of_a_daemons_own_is_what_it_derives_from() -> None:
    class Own(errors.NotPossibleNow):
        pass

    raised = await _through_a_call(Own("not now"))
    assert type(raised) is errors.NotPossibleNow


async def test_a_daemon_that_is_gone_is_unreachable() -> None:
    async with grpc.aio.insecure_channel("unix:/nonexistent/x.sock") as channel:
        with pytest.raises(errors.HostUnreachable), status.rpc_errors():
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def _through_a_call(error: BaseException) -> BaseException:
    server = grpc.aio.server()
    servicer = _Failing()
    servicer.error = error
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(errors.ForkyError) as caught, status.rpc_errors():
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            return caught.value
    finally:
        await server.stop(None)
