"""Commands and the console: at once as JSON, or live over a WebSocket.

Of a WebSocket, text messages are JSON and say what goes on; binary ones are bytes of a stream. From the server the
first byte of a binary message names it: 1 stdout, 2 stderr; what a caller sends is stdin as it is.
"""

import asyncio
import base64
import binascii
import contextlib
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, WebSocket
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.websockets import WebSocketDisconnect

from forkypig import errors
from forkypig.rest import bodies, problems, resources
from forkypig.rest.bodies import Reference
from forkypig.rest.deps import BYTES, CHANGES, Sdk
from forkypig.rest.presence import while_there
from forkypig.rest.progress import unexpected
from forkypig.sdk.limited import exec_limited
from forkypig.sdk.process import Process

router = APIRouter(prefix="/v1/machines/{machine}", tags=["commands"])
log = structlog.get_logger()
_STREAMS = {"stdout": b"\x01", "stderr": b"\x02"}
_POLICY, _FAILED = 1008, 1011  # RFC 6455, section 7.4.1


@router.post("/exec", dependencies=CHANGES)
async def exec_command(request: Request, machine: Reference, forky: Sdk, body: bodies.Exec) -> resources.ExecResult:
    """Runs a command to its end. A caller that goes away ends the command."""
    found = await forky.get(machine)
    done = await while_there(
        request,
        exec_limited(
            found,
            body.argv,
            most_bytes=body.output_limit_bytes,
            environment=body.environment,
            directory=body.directory,
            user=body.user,
            timeout_s=body.timeout_s,
            stdin=_decoded(body) if body.stdin else None,
        ),
    )

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode() if body.encoding == "base64" else data.decode(errors="replace")

    return resources.ExecResult(
        exit_code=done.exit_code,
        stdout=text(done.stdout),
        stderr=text(done.stderr),
        stdout_omitted_bytes=done.stdout_omitted,
        stderr_omitted_bytes=done.stderr_omitted,
        timed_out=done.timed_out,
        failure=done.failure or None,
    )


def _decoded(body: bodies.Exec) -> bytes:
    if body.encoding == "utf-8":
        return body.stdin.encode()
    try:
        return base64.b64decode(body.stdin, validate=True)
    except (binascii.Error, ValueError) as error:
        raise errors.InvalidRequest("stdin is not base64: encode it so, or leave `encoding` out") from error


@router.get("/console", response_class=Response, responses={200: {"content": {"application/octet-stream": BYTES}}})
async def read_console(machine: Reference, forky: Sdk) -> Response:
    """What its console printed, from the beginning."""
    console = (await forky.get(machine)).console()
    first = await anext(aiter(console), b"")

    async def whole() -> Any:
        yield first
        async for piece in console:
            yield piece

    return StreamingResponse(whole(), media_type="application/octet-stream")


class _Size(bodies._Body):
    rows: Annotated[int, Field(strict=True, ge=1, le=10_000)]
    columns: Annotated[int, Field(strict=True, ge=1, le=10_000)]


class _Start(bodies._Body):
    """The first message of an exec."""

    argv: Annotated[list[bodies.Text], Field(min_length=1, max_length=10_000)]
    environment: Annotated[dict[str, bodies.Text], Field(max_length=10_000)] = Field(default={})
    directory: bodies.Text = ""
    user: bodies.Text = ""
    timeout_s: bodies.Seconds = 0.0
    terminal: _Size | None = None
    stdin: bodies.Flag = False


class _Control(bodies._Body):
    """Any later text message: one of these."""

    resize: _Size | None = None
    signal: Annotated[int, Field(strict=True, ge=1, le=64)] | None = None
    stdin_closed: Literal[True] | None = None


@router.websocket("/exec")
async def exec_live(websocket: WebSocket, machine: str, forky: Sdk) -> None:
    """A command, live. The first message is JSON: {"argv": […], …}; see docs/rest.md."""
    await websocket.accept()
    async with _problems_told(websocket):
        start = _Start.model_validate_json(await websocket.receive_text())
        found = await forky.get(machine)
        process = found.process(
            start.argv,
            environment=start.environment,
            directory=start.directory,
            user=start.user,
            timeout_s=start.timeout_s,
            terminal=(start.terminal.rows, start.terminal.columns) if start.terminal else None,
            stdin=start.stdin,
        )
        async with process:
            listening = asyncio.create_task(_listen(websocket, process))
            telling = asyncio.create_task(_tell(websocket, process))
            try:
                # The caller's side ends only by its going away or by what is wrong with it.
                await asyncio.wait([listening, telling], return_when=asyncio.FIRST_COMPLETED)
                await (telling if telling.done() else listening)
            finally:
                for task in (listening, telling):
                    task.cancel()
                await asyncio.gather(listening, telling, return_exceptions=True)
        end = {"code": process.exit_code, "timed_out": process.timed_out, "failure": process.failure or None}
        await websocket.send_json({"exit": end})
        await websocket.close()


async def _tell(websocket: WebSocket, process: Process) -> None:
    async for output in process:
        await websocket.send_bytes(_STREAMS[output.stream] + output.data)


async def _listen(websocket: WebSocket, process: Process) -> None:
    """What the caller sends, to the command; raises WebSocketDisconnect when it goes away."""
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        with contextlib.suppress(errors.NotPossibleNow):  # it has ended, and its end is on its way
            if (data := message.get("bytes")) is not None:
                await process.write(data)
            else:
                await _control(process, _Control.model_validate_json(message.get("text") or ""))


async def _control(process: Process, control: _Control) -> None:
    if control.resize is not None:
        await process.resize(control.resize.rows, control.resize.columns)
    if control.signal is not None:
        await process.signal(control.signal)
    if control.stdin_closed:
        await process.close_stdin()


@router.websocket("/console")
async def console_live(websocket: WebSocket, machine: str, forky: Sdk) -> None:
    """Its console from the beginning, and on, until the machine or the caller is gone: binary messages of raw bytes."""
    await websocket.accept()
    async with _problems_told(websocket):
        found = await forky.get(machine)
        telling = asyncio.create_task(_console(websocket, found.console(follow=True)))
        leaving = asyncio.create_task(_left(websocket))
        try:
            await asyncio.wait([telling, leaving], return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                await telling
                await websocket.close()
        finally:
            for task in (telling, leaving):
                task.cancel()
            await asyncio.gather(telling, leaving, return_exceptions=True)


async def _console(websocket: WebSocket, console: Any) -> None:
    async with contextlib.aclosing(console):
        async for piece in console:
            await websocket.send_bytes(piece)


async def _left(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


@contextlib.asynccontextmanager
async def _problems_told(websocket: WebSocket) -> Any:
    """What goes wrong in the block is told as {"problem": …}, and then the socket is closed."""
    try:
        yield
    except (WebSocketDisconnect, RuntimeError):
        return  # nobody is there to be told
    except (ValidationError, KeyError, ValueError) as error:
        wrong = errors.InvalidRequest(f"the message is none that this takes: {_first_of(error)}")
        await _refuse(websocket, _POLICY, wrong)
    except errors.ForkyError as error:
        await _refuse(websocket, _FAILED, error)
    except Exception as error:
        log.error("call failed", exc_info=error)
        await _refuse(websocket, _FAILED, unexpected(error))


async def _refuse(websocket: WebSocket, code: int, error: errors.ForkyError) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await websocket.send_json({"problem": problems.document(error)})
        await websocket.close(code)


def _first_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return "text of JSON is needed"
