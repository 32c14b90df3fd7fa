"""Refuses the calls of controllers that others have declared dead.

Controllers that share a database say with every call who they are, and their fencing number. Of each the highest
number is remembered, on disk; a lower one is of a process that stood still while another took its place. Calls without
a number are of a controller that is alone, and pass.
(The pattern: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html, "Making the lock safe with
fencing".)
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog

from forkypig.errors import ForkyError, InternalError, InvalidRequest, NotPossibleNow
from forkypig.wire.status import abort

log = structlog.get_logger()

NAME, NUMBER = "forky-controller", "forky-fencing"
_LONGEST_NAME = 280
_DIGITS = 18


class Fences:
    """The lowest number that is accepted, by controller."""

    def __init__(self, path: Path) -> None:
        """Raises InternalError where the file is there and can't be read: to forget it would let the dead in."""
        self._path = path
        self._turn = asyncio.Lock()
        try:
            self._lowest: dict[str, int] = {str(k): int(v) for k, v in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            self._lowest = {}
        except (OSError, ValueError, AttributeError) as error:
            raise InternalError(
                f"{path} is damaged ({error}): end all controllers but one, remove the file, and start hostd again"
            ) from error

    async def check(self, controller: str, number: int) -> None:
        """Raises NotPossibleNow for a number that is too low; remembers a higher one."""
        lowest = self._lowest.get(controller, 0)
        if number < lowest:
            log.warning("call refused", controller=controller, fencing=number, lowest=lowest)
            raise NotPossibleNow(
                f"controller «{controller}» was declared dead, or started again, since it began this: another one has "
                "finished or undone it; try again"
            )
        if number > lowest:
            await self.raise_to(controller, number)

    async def raise_to(self, controller: str, number: int) -> None:
        """From here on lower numbers are refused. It is on disk when this returns."""
        if not 0 < len(controller) <= _LONGEST_NAME:
            raise InvalidRequest(f"a controller's name has 1 to {_LONGEST_NAME} characters: set FORKY_CONTROLLER_NAME")
        async with self._turn:
            if number <= self._lowest.get(controller, 0):
                return
            raised = {**self._lowest, controller: number}
            try:
                await asyncio.to_thread(_write, self._path, raised)
            except OSError as error:
                # In force all the same: only a hostd that is started again would not know it.
                log.error("fences not written", path=str(self._path), error=str(error))
            self._lowest = raised


def _write(path: Path, fences: dict[str, int]) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        json.dump(fences, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class FenceInterceptor(grpc.aio.ServerInterceptor):
    """Checks every call before its method is entered."""

    def __init__(self, fences: Fences) -> None:
        self._fences = fences

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        said = {key: value for key, value in details.invocation_metadata or () if key in (NAME, NUMBER)}
        if not said:
            return await continuation(details)
        try:
            await self._fences.check(str(said.get(NAME, "")), _number(said.get(NUMBER)))
        except ForkyError as error:
            return _refusing(await continuation(details), error)
        return await continuation(details)


def _number(value: object) -> int:
    if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > _DIGITS:
        raise InvalidRequest(f"{NUMBER} must be a number of at most {_DIGITS} digits")
    return int(value)


def _refusing(handler: Any, error: ForkyError) -> Any:
    """A handler of the same kind that raises."""
    if handler is None:
        return None

    async def refuse(_request: Any, context: Any) -> None:
        await abort(context, error)

    async def refuse_stream(_request: Any, context: Any) -> Any:
        await abort(context, error)
        yield  # makes it a generator

    coders = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse_stream, **coders)
        return grpc.stream_unary_rpc_method_handler(refuse, **coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream, **coders)
    return grpc.unary_unary_rpc_method_handler(refuse, **coders)
