"""`python -m forkypig.rest`: where it listens, where it refuses to, and that `forky up` and `down` look after it."""

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from forkypig import errors
from forkypig.certificates.authority import Authority
from forkypig.daemon.home import Home
from forkypig.daemon.settings import Settings
from forkypig.rest.server import run
from forkypig.sdk import local, pids, shutdown
from forkypig.v1 import controller_pb2, controller_pb2_grpc
from tests.component.controller_rig import home

_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_FAKE = Path(__file__).with_name("fake_daemon.py")


class Checking(controller_pb2_grpc.ControllerServicer):
    """A controller that knows one token."""

    def __init__(self) -> None:
        self.last: dict[Any, Any] = {}  # metadata

    async def ListMachines(self, request: Any, context: Any) -> controller_pb2.ListMachinesResponse:  # noqa: N802
        self.last = dict(context.invocation_metadata())
        if self.last.get("authorization") not in (None, "Bearer fp_good"):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not valid: ask for a new one")
        return controller_pb2.ListMachinesResponse()


class Trusting(controller_pb2_grpc.ControllerServicer):
    """One that checks nothing."""

    async def ListMachines(self, request: Any, context: Any) -> controller_pb2.ListMachinesResponse:  # noqa: N802
        return controller_pb2.ListMachinesResponse()


async def controller(settings: Settings, servicer: controller_pb2_grpc.ControllerServicer) -> grpc.aio.Server:
    server = grpc.aio.server()
    controller_pb2_grpc.add_ControllerServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{settings.socket('controller')}")
    await server.start()
    return server


@pytest.fixture
def settings() -> Iterator[Settings]:
    with home() as made:
        yield made


@pytest.fixture
async def checking(settings: Settings) -> AsyncIterator[Checking]:
    servicer = Checking()
    server = await controller(settings, servicer)
    yield servicer
    await server.stop(None)


class Running:
    """The process."""

    def __init__(self, settings: Settings, **variables: str) -> None:
        self.settings, self.variables = settings, variables
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> str:
        """Its address."""
        environment = {**os.environ, "FORKY_HOME": str(self.settings.home), **self.variables}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "forkypig.rest", env=environment, stderr=asyncio.subprocess.PIPE
        )
        mark = self.settings.run / "rest.address"
        while not mark.exists() or not mark.read_text():
            assert self.process.returncode is None, (await self.process.communicate())[1].decode()
            await asyncio.sleep(0.05)
        return mark.read_text().strip().removeprefix("unix:")

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.stderr is not None
        await self.process.communicate()
        assert self.process.returncode == 0


async def refusal(settings: Settings, **fields: str) -> str:
    with pytest.raises(errors.ForkyError) as caught:
        await run(settings.model_copy(update=fields))
    return str(caught.value)


async def test_where_it_listens(settings: Settings, checking: Checking) -> None:
    async with Running(settings, FORKY_REST="unix") as address:
        assert address == str(settings.socket("rest"))
        assert Path(address).stat().st_mode & 0o777 == 0o600
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=address)) as http:
            assert (await http.get("http://forky/v1/machines")).json() == []
    assert not Path(address).exists()
    variables = {"FORKY_REST": "127.0.0.1:0", "FORKY_REST_PROXIES": "10.0.0.1, 127.0.0.0/8"}
    async with Running(settings, **variables) as address, httpx.AsyncClient() as http:
        url = f"{address}/v1/machines"
        assert (await http.get(url)).status_code == 401
        good = {"Authorization": "Bearer fp_good", "traceparent": _TRACE}
        for forwarded, peer in (("9.9.9.9, 192.0.2.7, 10.0.0.1", "192.0.2.7"), ("unknown", "0.0.0.0")):
            assert (await http.get(url, headers={**good, "X-Forwarded-For": forwarded})).status_code == 200
            assert (checking.last["forky-peer"], checking.last["traceparent"]) == (f"ipv4:{peer}:0", _TRACE)
        # What the controller says of a token that it does not know.
        assert (await http.get(url, headers={"Authorization": "Bearer fp_bad"})).status_code in (401, 500)


async def test_tls_with_the_certificates_of_auth_init(settings: Settings, checking: Checking) -> None:
    authority = Authority(settings.auth)
    authority.make(["127.0.0.1"])
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    good = {"Authorization": "Bearer fp_good"}
    async with Running(settings, FORKY_REST="0.0.0.0:0") as address:
        host, port = "127.0.0.1", int(address.rpartition(":")[2])
        assert address.startswith("https://")

        def shown() -> str:
            return ssl.get_server_certificate((host, port))

        first = await asyncio.to_thread(shown)
        assert first == authority.server_certificate.read_text()
        async with httpx.AsyncClient(verify=trust) as http:
            url = f"https://{host}:{port}/v1/machines"
            # No proxy is believed where none is named.
            assert (await http.get(url, headers={**good, "X-Forwarded-For": "192.0.2.7"})).status_code == 200
            assert checking.last["forky-peer"].startswith("ipv4:127.0.0.1:")
            # `forky auth renew`: new connections see the new one, those that are open go on.
            authority.renew()
            assert (await http.get(url, headers=good)).status_code == 200
        assert await asyncio.to_thread(shown) == authority.server_certificate.read_text() != first
        async with httpx.AsyncClient(verify=trust) as http:
            assert (await http.get(url, headers=good)).status_code == 200


async def test_one_that_dies_is_followed_by_the_next(settings: Settings, checking: Checking) -> None:
    running = Running(settings, FORKY_REST="unix")
    async with running as address:
        assert running.process is not None
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
        first = int(children.read_text())
        os.kill(first, signal.SIGKILL)
        async with (
            asyncio.timeout(30),
            httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=address, retries=0)) as http,
        ):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    assert (await http.get("http://forky/v1/health")).status_code == 200
                    break
                await asyncio.sleep(0.05)
        assert int(children.read_text()) != first


async def test_where_it_does_not(settings: Settings) -> None:
    assert "without TLS" in await refusal(settings, rest="0.0.0.0:0")
    assert "without TLS" in await refusal(settings, rest="example.org:0")
    for text in ("8080", "host:", ":80", "1.2.3.4:99999", "1.2.3.4:x"):
        assert "is no address" in await refusal(settings, rest=text)
    assert "forky up" in await refusal(settings, rest="unix")
    assert "can't be used" in await refusal(
        settings, rest="0.0.0.0:0", rest_certificate="/nowhere", rest_key="/nowhere"
    )
    assert "go together" in await refusal(settings, rest="0.0.0.0:0", rest_key="/nowhere")
    trusting = await controller(settings, Trusting())
    assert "does not check tokens" in await refusal(settings, rest="127.0.0.1:0")
    taken = settings.home / "file"
    taken.write_text("mine")
    assert "no socket" in await refusal(settings, rest=str(taken))
    assert taken.read_text() == "mine"
    await trusting.stop(None)


async def test_what_the_process_says(settings: Settings) -> None:
    environment = {**os.environ, "FORKY_HOME": str(settings.home), "FORKY_REST": "0.0.0.0:80"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forkypig.rest", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert said.decode().startswith("the REST API can't start: the REST API does not listen on 0.0.0.0:80 without TLS")


@pytest.mark.parametrize("daemon", ["hostd", "pager", "rest"])
async def test_a_daemon_does_without_what_is_for_consoles(daemon: str, tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", "-m", f"forkypig.{daemon}"),
        env={**os.environ, "FORKY_HOME": str(tmp_path), "FORKY_MTU": "1"},  # with which it ends once all is imported
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(child.communicate(), 60)
    assert b"can't start: FORKY_MTU" in said
    assert b" structlog" in said
    assert b" rich." not in said


async def test_up_and_down(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        local,
        "daemon_argv",
        lambda daemon: (
            [sys.executable, "-m", "forkypig.rest"]
            if daemon == "rest"
            else [sys.executable, str(_FAKE), daemon, "good"]
        ),
    )
    monkeypatch.setenv("FORKY_REST", "unix")
    place = Home(settings.home)
    try:
        await local.up(place)
        await local.up(place)
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(place.socket("rest")))) as http:
            assert (await http.get("http://forky/v1/health")).json() == {"status": "ok"}
        # It is seen, and one that is gone with its keeper comes back where it was, also from another environment.
        found = await local.status(place)
        assert found.rest is not None and found.rest_address == f"unix:{place.socket('rest')}"
        assert local.all_run(place)
        os.kill(found.rest.pid, signal.SIGKILL)
        while pids.running_pid(place.pid_file("rest")) is not None:
            await asyncio.sleep(0.02)
        assert not local.all_run(place) and "died" in (await local.status(place)).rest_error
        monkeypatch.delenv("FORKY_REST")
        await local.up(place)
        assert (await local.status(place)).rest is not None
    finally:
        await shutdown.down(place)
    assert pids.running_pid(place.pid_file("rest")) is None
    assert not place.socket("rest").exists()
    assert (await local.status(place)).rest_error == ""
