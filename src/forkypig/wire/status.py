"""Errors <-> gRPC status, by one table.

The status code tells a foreign client what kind of failure it was; the trailing metadata `forky-error` names our
class, so that our own client raises exactly what the daemon raised. gRPC's own failures (a daemon that is gone) are
mapped too.
"""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc

from forkypig import errors

_T = TypeVar("_T")

_METADATA_KEY = "forky-error"
# When a client may try again, in ms, as gRPC's own retries read it (gRFC A6).
_PUSHBACK_KEY = "grpc-retry-pushback-ms"

STATUS: dict[type[errors.ForkyError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.NotPossibleNow: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Busy: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyRequests: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Damaged: grpc.StatusCode.DATA_LOSS,
    errors.GuestUnresponsive: grpc.StatusCode.UNAVAILABLE,
    errors.MachineFailed: grpc.StatusCode.UNKNOWN,
    errors.HostUnreachable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.ForkyError: grpc.StatusCode.UNKNOWN,
}
_CLASSES = {cls.__name__: cls for cls in STATUS}
# For a status that carries no class of ours: what gRPC itself or a foreign server says.
_BY_CODE: dict[grpc.StatusCode, type[errors.ForkyError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.HostUnreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}


def _with_message(cls: type[errors.ForkyError], message: str, retry_after_s: float = 0.0) -> errors.ForkyError:
    """An instance of `cls` that says `message`, whatever fields its own constructor takes."""
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    if isinstance(error, errors.TooManyRequests):
        error.retry_after_s = retry_after_s
    return error


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends a call with what `error` is; a defect of ours is logged and told without its insides."""
    if not isinstance(error, errors.ForkyError):
        # Imported here, because clients use the other half of this module, and it costs them 100 ms.
        import structlog

        structlog.get_logger().error("call failed", exc_info=error)
        error = errors.InternalError(f"an unexpected error ({type(error).__name__}): the daemons' logs say more")
    # A daemon may have kinds of its own, which are one of these to everybody else.
    kind = next(cls for cls in type(error).__mro__ if cls in STATUS)
    metadata: tuple[tuple[str, str], ...] = ((_METADATA_KEY, kind.__name__),)
    if isinstance(error, errors.TooManyRequests):
        metadata = (*metadata, (_PUSHBACK_KEY, str(math.ceil(error.retry_after_s * 1000))))
    await context.abort(STATUS[kind], str(error), metadata)
    raise AssertionError("abort() returned")


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.ForkyError:
    """The error that the daemon raised, or for a failure of gRPC's own what comes nearest."""
    message = error.details() or error.code().name
    said = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    if (cls := _CLASSES.get(said.get(_METADATA_KEY, ""))) is not None:
        pushback_ms = said.get(_PUSHBACK_KEY, "")
        return _with_message(cls, message, int(pushback_ms) / 1000 if pushback_ms.isdecimal() else 0.0)
    return _with_message(_BY_CODE.get(error.code(), errors.InternalError), message)


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Turns the gRPC errors of the block into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def translated(stream: AsyncIterator[_T]) -> AsyncIterator[_T]:
    """The items of `stream`, its gRPC errors turned into ours."""
    with rpc_errors():
        async for item in stream:
            yield item
