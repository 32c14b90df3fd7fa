"""A channel whose calls say whose they are, and come again when the connection breaks.

A call that may change something carries a key of its own, so the controller knows it when it comes again: a retry
never makes two machines. What streams requests (exec, upload, import), or streams more than a result at last, is not
repeated.

Wraps the stubs' four kinds of calls. gRPC's client interceptors could do it too, but for streams they put a queue and
tasks of their own between us and the call's flow control; gRPC's own retries stop at the first message of progress.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from forkypig.wire.keys import KEY, NEW, ONCE, RESULT_AT_LAST

Metadata = Sequence[tuple[str, str]]

# A controller that is started again serves after some seconds.
_PATIENCE_S = 30.0
# One that was not there to begin with is hardly going to be; it may just be starting.
_FIRST_PATIENCE_S = 1.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


class _Patience:
    """How long one call is tried."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._broken_s: float | None = None  # when it first broke after it had reached the controller
        self._pause_s = _PAUSE_S

    async def after(self, error: grpc.aio.AioRpcError) -> None:
        """Waits before the next attempt; raises `error` when there is to be none."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE or _said_by_controller(error):
            raise error
        now_s = self._loop.time()
        if self._broken_s is None and not _never_connected(error):
            self._broken_s = now_s
        ends_s = self._began_s + _FIRST_PATIENCE_S if self._broken_s is None else self._broken_s + _PATIENCE_S
        if now_s + self._pause_s > ends_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _said_by_controller(error: grpc.aio.AioRpcError) -> bool:
    return any(key == "forky-error" for key, _ in error.trailing_metadata() or ())


def _never_connected(error: grpc.aio.AioRpcError) -> bool:
    """gRPC has no other way to tell; a wrong guess only changes how long we wait."""
    return "failed to connect" in (error.details() or "").lower()


class _RepeatedStream:
    """A stream of messages, begun again where it broke before its result."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin, self._call = begin, begin()

    def cancel(self) -> bool:
        return bool(self._call.cancel())

    async def __aiter__(self) -> AsyncIterator[Any]:
        patience = _Patience()
        while True:
            try:
                async for message in self._call:
                    yield message
            except grpc.aio.AioRpcError as error:
                await patience.after(error)
            else:
                return
            finally:
                self._call.cancel()  # gRPC sees by itself only who leaves in the midst of a message
            self._call = self._begin()


class Channel(grpc.aio.Channel):
    """What the stubs take for a channel; gRPC's own does the work."""

    def __init__(self, inner: grpc.aio.Channel, metadata: Metadata) -> None:
        self._inner, self._metadata = inner, tuple(metadata)

    def _with(self, extra: Metadata | None, method: str) -> Metadata:
        key = () if method in ONCE else ((KEY, secrets.token_hex(16)),)
        return (*self._metadata, *key, *(extra or ()))

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        inner: Any = self._inner.unary_unary(method, *arguments, **options)

        async def call(request: Any, *, metadata: Metadata | None = None, **rest: Any) -> Any:
            metadata, patience = self._with(metadata, method), _Patience()
            new: Metadata = tuple((NEW, key) for name, key in metadata if name == KEY)
            while True:
                try:
                    return await inner(request, metadata=(*metadata, *new), **rest)
                except grpc.aio.AioRpcError as error:
                    if method in ONCE:
                        raise
                    await patience.after(error)
                new = ()

        return call

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        inner: Any = self._inner.unary_stream(method, *arguments, **options)

        def call(request: Any, *, metadata: Metadata | None = None, **rest: Any) -> Any:
            metadata = self._with(metadata, method)
            if method in RESULT_AT_LAST:
                return _RepeatedStream(lambda: inner(request, metadata=metadata, **rest))
            return inner(request, metadata=metadata, **rest)

        return call

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._streaming(self._inner.stream_unary(method, *arguments, **options))

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._streaming(self._inner.stream_stream(method, *arguments, **options))

    def _streaming(self, inner: Any) -> Any:
        def call(*requests: Any, metadata: Metadata | None = None, **rest: Any) -> Any:
            return inner(*requests, metadata=(*self._metadata, *(metadata or ())), **rest)

        return call

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
