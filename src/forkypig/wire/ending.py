"""How a call that we write to has ended.

Where a daemon ends such a call early, grpcio may put "Internal error from Core" in place of the status that has
arrived (https://github.com/grpc/grpc/issues/36066), and with it goes what the daemon said.
"""

from collections.abc import Coroutine
from types import TracebackType
from typing import Any

import grpc

_LOST = "Internal error from Core"


class Ending:
    """Made with the call, entered where its end is awaited: an error that leaves the block is the daemon's own."""

    def __init__(self, call: grpc.aio.Call) -> None:
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        # It is called with the first status, before another can take its place: what is awaited here is there already.
        metadata = grpc.aio.Metadata()
        trailing = _now(call.trailing_metadata()) or metadata
        self._first = grpc.aio.AioRpcError(
            _now(call.code()), metadata, trailing, _now(call.details()), _now(call.debug_error_string())
        )

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not isinstance(error, grpc.aio.AioRpcError) or error.details() != _LOST or self._first is None:
            return
        if self._first.code() is not grpc.StatusCode.OK and self._first.details() != _LOST:
            raise self._first from error


def _now(answer: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    answer.close()
    raise AssertionError("the call has ended, and its status is to come")
