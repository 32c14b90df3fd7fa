"""A channel whose calls all carry the same metadata."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

Metadata = Sequence[tuple[str, str]]


class _Channel:
    """Not an interceptor: those stand between a stream and its caller, and delay what is cancelled."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._channel, self._metadata = channel, tuple(metadata)

    def _calling(self, kind: str) -> Callable[..., Callable[..., Any]]:
        def make(*arguments: Any, **options: Any) -> Callable[..., Any]:
            method = getattr(self._channel, kind)(*arguments, **options)

            def call(*request: Any, metadata: Metadata | None = None, **more: Any) -> Any:
                return method(*request, metadata=(*(metadata or ()), *self._metadata), **more)

            return call

        return make

    def __getattr__(self, name: str) -> Any:
        if name in {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}:
            return self._calling(name)
        return getattr(self._channel, name)


def with_metadata(channel: grpc.aio.Channel, metadata: Metadata) -> grpc.aio.Channel:
    """`channel`, its calls with `metadata` besides their own."""
    return cast(grpc.aio.Channel, _Channel(channel, metadata)) if metadata else channel
