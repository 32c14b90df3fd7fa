"""Calls that say who makes them: every call of a channel carries the controller's name and fencing number.

A wrapper and not an interceptor: those cost a task for every call.
"""

from collections.abc import Callable
from typing import Any

import grpc

Stamp = tuple[tuple[str, str], ...]


class StampedChannel:
    """As much of a channel as stubs need."""

    def __init__(self, channel: grpc.aio.Channel, stamp: Callable[[], Stamp]) -> None:
        self._channel, self._stamp = channel, stamp

    def _stamped(self, method: Any) -> Any:
        def call(*arguments: Any, metadata: Any = (), **named: Any) -> Any:
            return method(*arguments, metadata=(*(metadata or ()), *self._stamp()), **named)

        return call

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return self._stamped(self._channel.unary_unary(*arguments, **named))

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return self._stamped(self._channel.unary_stream(*arguments, **named))

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        return self._stamped(self._channel.stream_unary(*arguments, **named))

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        return self._stamped(self._channel.stream_stream(*arguments, **named))
