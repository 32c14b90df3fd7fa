"""Calls carry the trace under way: interceptors for gRPC's asynchronous channels."""

from typing import Any

import grpc

from forkypig.tracing.recorder import Recorder, is_under_way

_LEFT_OUT = "/grpc.health"  # asked many times while a daemon starts


class _Carrying:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def _carry(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        if not is_under_way() or method.startswith(_LEFT_OUT):
            return await continuation(details, request)
        span, carried = self._recorder.calling(method.removeprefix("/forkypig.v1."))
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *carried)
        try:
            call = await continuation(details._replace(metadata=metadata), request)
        except BaseException:
            span.end()
            raise
        call.add_done_callback(lambda _: span.end())
        return call


class _UnaryUnary(_Carrying, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._carry(continuation, details, request)


class _UnaryStream(_Carrying, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._carry(continuation, details, request)


class _StreamUnary(_Carrying, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await self._carry(continuation, details, requests)


class _StreamStream(_Carrying, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await self._carry(continuation, details, requests)


def interceptors(recorder: Recorder) -> list[Any]:
    """One of each kind of call."""
    return [kind(recorder) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]
