"""The REST API in this process, on a Unix socket, before a real controller; the host's guests are made up."""

import asyncio
import contextlib
import io
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from forkypig.daemon.settings import Settings
from forkypig.errors import NotFound
from forkypig.rest.app import make_app
from forkypig.rest.caller import CallerChannel
from forkypig.rest.listening import Address, bound
from forkypig.rest.server import made_server
from forkypig.sdk.client import Forky
from forkypig.v1 import agent_pb2
from forkypig.v1 import common_pb2 as common
from forkypig.wire.status import abort
from tests.component.controller_rig import home, serving
from tests.component.fake_host import FakeHost


class GuestHost(FakeHost):
    """Guests with files, whose commands say back their arguments and then what they are told."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self.exec_began = asyncio.Event()
        self.files: dict[str, bytes] = {"/etc/motd": b"welcome\n"}

    async def Exec(self, request_iterator: Any, context: Any) -> AsyncIterator[agent_pb2.ExecResponse]:  # noqa: N802
        try:
            start = (await anext(request_iterator)).start
            self.calls["Exec"].append(start)
            self.exec_began.set()
            yield agent_pb2.ExecResponse(started=agent_pb2.ExecStarted(pid=7))
            if start.argv[0] == "python3":  # the listing of a directory
                listing = b"\0".join([b"/etc/motd", b"32768", b"420", b"0", b"0", b"8", b"1", b"1", b"", b""])
                yield agent_pb2.ExecResponse(stdout=listing)
            elif "flood" in start.argv:
                for n in range(int(start.argv[1]) if start.argv[0] == "flood" else 1000):
                    yield agent_pb2.ExecResponse(stdout=b"%04d" % n * 256)
            elif start.argv[0] == "sleep":
                await asyncio.sleep(3600)
            else:
                yield agent_pb2.ExecResponse(stdout=" ".join(start.argv).encode())
                yield agent_pb2.ExecResponse(stderr=b"\xff")
            if start.stdin:
                async for request in request_iterator:
                    if request.HasField("stdin_closed"):
                        break
                    yield agent_pb2.ExecResponse(stdout=request.stdin or f"[{request}]".encode())
            yield agent_pb2.ExecResponse(exit=agent_pb2.ExecExit(code=3 if start.argv[0] == "false" else 0))
        finally:
            self.exec_ended.set()

    async def PackSnapshot(self, request: Any, context: Any) -> AsyncIterator[common.Progress]:  # noqa: N802
        yield common.Progress(step="packing", done=1, total=2)
        self.snapshots[request.snapshot].packed = True

    async def StatPath(self, request: Any, context: Any) -> agent_pb2.StatPathResponse:  # noqa: N802
        content = self.files.get(request.path)
        return agent_pb2.StatPathResponse(exists=content is not None, size_bytes=len(content or b""))

    async def Download(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.DownloadResponse]:  # noqa: N802
        if (content := self.files.get(request.path)) is None:
            await abort(context, NotFound("file", request.path))
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            entry = tarfile.TarInfo(request.path.rpartition("/")[2])
            entry.size = len(content or b"")
            tar.addfile(entry, io.BytesIO(content or b""))
        for at in range(0, made.tell(), 10_000):
            yield agent_pb2.DownloadResponse(data=made.getvalue()[at : at + 10_000])

    async def Upload(self, request_iterator: Any, context: Any) -> agent_pb2.UploadResponse:  # noqa: N802
        start = (await anext(request_iterator)).start
        whole = b"".join([request.data async for request in request_iterator])
        files = 0
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            for entry in tar.getmembers():
                files += 1
                content = tar.extractfile(entry)
                self.files[f"{start.directory.rstrip('/')}/{entry.name}"] = content.read() if content else b""
        return agent_pb2.UploadResponse(files=files, bytes=len(whole))


@dataclass
class Rest:
    """What a test works with."""

    settings: Settings
    host: GuestHost
    http: httpx.AsyncClient

    async def run(self, name: str) -> dict[str, Any]:
        made = await self.http.post("/v1/machines", json={"name": name})
        assert made.status_code == 201, made.text
        document: dict[str, Any] = made.json()
        return document


@contextlib.asynccontextmanager
async def rest(*, token_needed: bool = False, **fields: Any) -> AsyncIterator[Rest]:
    """`fields`: settings that are not to be the defaults."""
    with home(**fields) as settings:
        async with (
            running_guests(settings) as host,
            serving(settings),
            Forky(settings.home, start=False, token="", tenant="", wrap_channel=CallerChannel) as forky,  # type: ignore[arg-type]
        ):
            server = made_server(make_app(forky, token_needed=token_needed))
            with bound(Address.of(settings)) as listener:
                running = asyncio.create_task(server.serve([listener]))
                transport = httpx.AsyncHTTPTransport(uds=str(settings.socket("rest")))
                async with httpx.AsyncClient(transport=transport, base_url="http://forky", timeout=30) as client:
                    yield Rest(settings, host, client)
                server.should_exit = True
                await running


@contextlib.asynccontextmanager
async def running_guests(settings: Settings) -> AsyncIterator[GuestHost]:
    host = GuestHost(settings.socket("hostd"))
    await host.start()
    try:
        yield host
    finally:
        await host.stop()
