"""The edges of our gRPC services: what a method raises becomes the status of its call, what cannot be read is its
caller's mistake, and a trace goes on."""

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from forkypig import tracing
from forkypig.errors import InvalidRequest
from forkypig.wire.status import abort

_T = TypeVar("_T")
_OURS = "/forkypig."


def answered(method: Callable[..., Awaitable[_T]]) -> Callable[..., Coroutine[Any, Any, _T]]:
    """A method that answers once."""

    name = _name(method)

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> _T:
        try:
            with _entered(name, request, context):
                return await method(self, request, context)
        except Exception as error:
            await abort(context, error)

    return call


def streamed(method: Callable[..., AsyncIterator[_T]]) -> Callable[..., AsyncGenerator[_T, None]]:
    """A method that streams: an asynchronous generator, which ends when the caller goes away."""

    name = _name(method)

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> AsyncGenerator[_T, None]:
        try:
            with _entered(name, request, context):
                async with aclosing(cast(AsyncGenerator[_T, None], method(self, request, context))) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:
            await abort(context, error)

    return call


def _entered(name: str, request: Any, context: Any) -> AbstractContextManager[Any]:
    """For the block that answers. Raises InvalidRequest where that came in place of a request, from `Reader`."""
    if isinstance(request, InvalidRequest):
        raise request
    return tracing.serving(name, context)


def read(method: str, reader: Callable[[bytes], Any], raw: bytes) -> Any:
    """A request. Raises InvalidRequest for bytes that are none."""
    try:
        return reader(raw)
    except DecodeError as error:
        raise InvalidRequest(f"what came is no request of {method}: use a client of this version") from error


class Reader(grpc.aio.ServerInterceptor):
    """Has requests read by `read`: gRPC calls what can't be read a defect of ours (UNKNOWN), and logs a traceback."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler: Any = await continuation(details)
        method, reader = str(details.method), getattr(handler, "request_deserializer", None)
        if reader is None or not method.startswith(_OURS):
            return handler
        if handler.request_streaming:
            return handler._replace(request_deserializer=lambda raw: read(method, reader, raw))

        def found(raw: bytes) -> Any:
            try:
                return read(method, reader, raw)
            except InvalidRequest as error:  # raised here it would not reach the method: `answered` raises it
                return error

        return handler._replace(request_deserializer=found)


def _name(method: Callable[..., Any]) -> str:
    """Service and method as gRPC has them: «Host/ForkMachine»."""
    servicer, _, name = method.__qualname__.rpartition(".")
    return f"{servicer.removesuffix('Servicer')}/{name}"
