"""The edges of our gRPC services: what a method raises becomes the status of its call, and a trace goes on."""

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

from forkypig import tracing
from forkypig.wire.status import abort

_T = TypeVar("_T")


def answered(method: Callable[..., Awaitable[_T]]) -> Callable[..., Coroutine[Any, Any, _T]]:
    """A method that answers once."""

    name = _name(method)

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> _T:
        try:
            with tracing.serving(name, context):
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
            with tracing.serving(name, context):
                async with aclosing(cast(AsyncGenerator[_T, None], method(self, request, context))) as messages:
                    async for message in messages:
                        yield message
        except Exception as error:
            await abort(context, error)

    return call


def _name(method: Callable[..., Any]) -> str:
    """Service and method as gRPC has them: «Host/ForkMachine»."""
    servicer, _, name = method.__qualname__.rpartition(".")
    return f"{servicer.removesuffix('Servicer')}/{name}"
