"""The REST API before a real controller whose host is made up."""

import asyncio
import base64
import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import InvalidStatus

from forkypig import errors
from forkypig.model.access import Role
from forkypig.rest import problems
from forkypig.rest.app import make_app, openapi_text
from forkypig.rest.caller import CallerChannel
from forkypig.sdk.client import Forky
from forkypig.v1 import common_pb2, controller_pb2, controller_pb2_grpc
from forkypig.wire import status as wire_status
from tests.component.controller_rig import home
from tests.component.rest_rig import Rest, rest


@pytest.fixture
async def api() -> AsyncIterator[Rest]:
    async with rest() as made:
        yield made


def is_problem(answer: httpx.Response, status: int, kind: str) -> str:
    """Asserts that it is a problem of this kind; its sentence."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert document["status"] == status
    assert document["type"] == f"urn:forkypig:problem:{kind}"
    return str(document["detail"])


async def test_a_life(api: Rest) -> None:
    made = await api.http.post("/v1/machines", json={"name": "web", "memory_mib": 256, "config": {"egress": "deny"}})
    assert made.status_code == 201
    web = made.json()
    assert (web["name"], web["state"], web["memory_mib"], web["network"]["egress"]) == ("web", "running", 256, "deny")
    assert made.headers["location"] == f"/v1/machines/{web['id']}"
    assert web["ready_ms"] > 0
    forked = await api.http.post("/v1/machines/web/fork", json={"count": 2})
    assert forked.status_code == 201
    assert [child["name"] for child in forked.json()["children"]] == ["web-1", "web-2"]
    names = [machine["name"] for machine in (await api.http.get("/v1/machines")).json()]
    assert names == ["web", "web-1", "web-2"]
    kept = (await api.http.post("/v1/machines/web/snapshots", json={"tag": "clean", "message": "hm"})).json()
    assert (kept["tag"], kept["kind"], kept["message"]) == ("clean", "kept", "hm")
    for verb, state in (("pause", "paused"), ("resume", "running"), ("stop", "stopped"), ("start", "running")):
        answer = await api.http.post(f"/v1/machines/web-1/{verb}")
        assert (answer.status_code, answer.json()["state"]) == (200, state), verb
    restored = await api.http.post("/v1/machines/web/restore", json={"snapshot": "clean"})
    assert restored.json()["snapshot"] == kept["id"]
    changed = await api.http.patch("/v1/machines/web", json={"publish": [{"host_port": 8080, "guest_port": 80}]})
    assert changed.json()["network"]["ports"][0]["host_port"] == 8080
    history = (await api.http.get("/v1/machines/web/history")).json()
    assert [each["id"] for each in history][:1] == [kept["id"]]
    tagged = await api.http.put("/v1/tags/good", json={"snapshot": "clean", "force": True})
    assert tagged.json()["tag"] == "good"
    child = (await api.http.post("/v1/snapshots/good/fork", json={"name": "again"})).json()["children"][0]
    assert child["name"] == "again-1"
    assert (await api.http.delete("/v1/machines/web-2")).status_code == 204
    is_problem(await api.http.get("/v1/machines/web-2"), 404, "not-found")
    assert (await api.http.get("/v1/status")).json()["machines"] == 3
    assert (await api.http.get("/v1/doctor")).json()["checks"]
    assert (await api.http.get("/v1/health")).json() == {"status": "ok"}
    image = (await api.http.get("/v1/images")).json()[0]
    patched = await api.http.patch(f"/v1/images/{image['id']}", json={"forget_files": ["/root/.ssh"]})
    assert patched.json()["forget_files"] == ["/root/.ssh"]


async def test_errors_are_problems(api: Rest) -> None:
    await api.run("web")
    said = is_problem(await api.http.post("/v1/machines", json={"name": "web"}), 409, "already-exists")
    assert "choose another name" in said
    await api.http.patch("/v1/machines/web", json={"no_fork": True})
    is_problem(await api.http.post("/v1/machines/web/fork", json={}), 409, "not-possible-now")
    is_problem(await api.http.post("/v1/machines", json={"config": {"egress": "everywhere"}}), 400, "invalid-request")
    wrong = await api.http.post("/v1/machines", json={"memory": 5, "cpus": -1})
    is_problem(wrong, 422, "invalid-request")
    assert {each["where"] for each in wrong.json()["errors"]} == {"body.memory", "body.cpus"}
    api.host.fail("PauseMachine", errors.MachineFailed("QEMU died"))
    is_problem(await api.http.post("/v1/machines/web/pause"), 502, "machine-failed")
    api.host.fail("PauseMachine", errors.GuestUnresponsive("it sleeps"))
    is_problem(await api.http.post("/v1/machines/web/pause"), 503, "guest-unresponsive")
    is_problem(await api.http.get("/v1/nothing"), 404, "not-found")
    refused = await api.http.put("/v1/machines")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST")
    as_curl_does = await api.http.post("/v1/machines", content='{"name": "x"}', headers={"Content-Type": "text/plain"})
    assert as_curl_does.status_code == 415
    assert "send «Content-Type: application/json»" in as_curl_does.json()["detail"]
    await api.host.stop()
    assert is_problem(await api.http.post("/v1/machines", json={}), 503, "host-unreachable")


async def test_names_that_are_none(api: Rest) -> None:
    for name in ("a%2Fb", "..", "a.b", "%00", "x" * 10_000, "m-0123456789AB", "%ED%A0%80", "ü"):
        for path in (f"/v1/machines/{name}", f"/v1/snapshots/{name}", f"/v1/machines/{name}/console"):
            answer = await api.http.get(path)
            assert answer.status_code in (404, 422), (path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
        is_problem(await api.http.post("/v1/machines", json={"name": name}), 422, "invalid-request")


async def test_bodies_that_are_none(api: Rest) -> None:
    async def post(content: Any, **headers: str) -> httpx.Response:
        return await api.http.post(
            "/v1/machines", content=content, headers={"Content-Type": "application/json", **headers}
        )

    for content in (b"", b"[]", b"null", b'"x"', b"{", b"\xff\xfe", b'{"name": "\\ud800"}', b'{"cpus": true}'):
        is_problem(await post(content), 422, "invalid-request")
    for content in (b"[" * 100_000, b'{"cpus": ' + b"9" * 5000 + b"}", b'{"cpus": NaN}', b'{"\\ud800": 1}'):
        assert (await post(content)).status_code in (400, 422)
    is_problem_413 = await post(b'{"name": "' + b"x" * (9 << 20) + b'"}')
    assert (is_problem_413.status_code, is_problem_413.headers["content-type"]) == (413, "application/problem+json")

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 20)

    assert (await post(endless())).status_code == 413
    assert (await api.http.get("/v1/machines")).json() == []


async def test_exec(api: Rest) -> None:
    await api.run("web")
    done = (await api.http.post("/v1/machines/web/exec", json={"argv": ["echo", "hi"], "stdin": "!"})).json()
    assert (done["exit_code"], done["stdout"], done["stderr"]) == (0, "echo hi!", "\ufffd")
    body = {"argv": ["cat"], "stdin": base64.b64encode(b"\0\xff").decode(), "encoding": "base64"}
    done = (await api.http.post("/v1/machines/web/exec", json=body)).json()
    assert base64.b64decode(done["stdout"]) == b"cat\0\xff"
    body = {"argv": ["flood", "64"], "output_limit_bytes": 4096}
    done = (await api.http.post("/v1/machines/web/exec", json=body)).json()
    assert done["stdout_omitted_bytes"] == 64 * 1024 - 4096
    assert done["stdout"].startswith("0000") and done["stdout"].endswith("0063") and "bytes left out" in done["stdout"]
    is_problem(await api.http.post("/v1/machines/web/exec", json={"argv": [""]}), 400, "invalid-request")
    wrong = {"argv": ["cat"], "stdin": "%", "encoding": "base64"}
    is_problem(await api.http.post("/v1/machines/web/exec", json=wrong), 400, "invalid-request")


async def test_a_caller_that_goes_away_ends_its_command(api: Rest) -> None:
    await api.run("web")
    asking = asyncio.create_task(api.http.post("/v1/machines/web/exec", json={"argv": ["sleep"]}))
    await asyncio.wait_for(api.host.exec_began.wait(), 20)
    asking.cancel()
    await asyncio.wait_for(api.host.exec_ended.wait(), 20)


def connect(api: Rest, path: str) -> Any:
    return unix_connect(str(api.settings.socket("rest")), f"ws://forky{path}", proxy=None)


async def test_exec_live(api: Rest) -> None:
    await api.run("web")
    async with connect(api, "/v1/machines/web/exec") as socket:
        start = {"argv": ["sh"], "stdin": True, "terminal": {"rows": 24, "columns": 80}}
        await socket.send(json.dumps(start))
        assert [await socket.recv(), await socket.recv()] == [b"\x01sh", b"\x02\xff"]
        await socket.send(b"typed")
        assert await socket.recv() == b"\x01typed"
        await socket.send(json.dumps({"resize": {"rows": 30, "columns": 100}}))
        assert b"rows: 30" in await socket.recv()
        await socket.send(json.dumps({"signal": 2}))
        assert b"signal: 2" in await socket.recv()
        await socket.send(json.dumps({"stdin_closed": True}))
        assert json.loads(await socket.recv()) == {"exit": {"code": 0, "timed_out": False, "failure": None}}
        await socket.wait_closed()
        assert socket.close_code == 1000
    async with connect(api, "/v1/machines/web/exec") as socket:
        api.host.exec_began.clear()
        api.host.exec_ended.clear()
        await socket.send(json.dumps({"argv": ["sleep"]}))
        await asyncio.wait_for(api.host.exec_began.wait(), 20)
    await asyncio.wait_for(api.host.exec_ended.wait(), 20)


async def test_live_messages_that_are_none(api: Rest) -> None:
    await api.run("web")
    for first in ("", "[]", "{", '{"argv": []}', '{"argv": ["x"], "more": 1}', b"\0"):
        async with connect(api, "/v1/machines/web/exec") as socket:
            await socket.send(first)
            assert json.loads(await socket.recv())["problem"]["type"] == "urn:forkypig:problem:invalid-request"
            await socket.wait_closed()
            assert socket.close_code == 1008


async def test_console(api: Rest) -> None:
    web = await api.run("web")
    assert (await api.http.get("/v1/machines/web/console")).text == f"console of {web['id']}"
    async with connect(api, "/v1/machines/web/console") as socket:
        assert [piece async for piece in socket] == [b"console of ", web["id"].encode()]
    async with connect(api, "/v1/machines/nobody/console") as socket:
        assert json.loads(await socket.recv())["problem"]["status"] == 404


async def test_files(api: Rest) -> None:
    await api.run("web")
    file, archive = "/v1/machines/web/file", "/v1/machines/web/archive"
    assert (await api.http.get(file, params={"path": "/etc/motd"})).content == b"welcome\n"
    is_problem(await api.http.get(file, params={"path": "/etc/none"}), 404, "not-found")
    is_problem(await api.http.get(file, params={"path": "etc"}), 422, "invalid-request")
    large = bytes(range(256)) * 40_000  # more than a body of JSON may be
    assert (await api.http.put(file, params={"path": "/root/big"}, content=large)).status_code == 204
    assert api.host.files["/root/big"] == large
    assert (await api.http.get(file, params={"path": "/root/big"})).content == large

    async def pieces() -> AsyncIterator[bytes]:
        yield b"of no known length"

    assert (await api.http.put(file, params={"path": "/root/x"}, content=pieces())).status_code == 411
    taken = await api.http.get(archive, params={"path": "/etc/motd"})
    with tarfile.open(fileobj=io.BytesIO(taken.content)) as tar:
        assert tar.getnames() == ["motd"]
    put = await api.http.put(archive, params={"path": "/srv"}, content=taken.content)
    assert (put.json()["files"], api.host.files["/srv/motd"]) == (1, b"welcome\n")
    for wrong in (b"", b"x", b"no archive" * 100, gzip.compress(taken.content)):
        is_problem(await api.http.put(archive, params={"path": "/srv"}, content=wrong), 400, "invalid-request")
    listed = (await api.http.get("/v1/machines/web/directory", params={"path": "/etc"})).json()
    assert listed["complete"] is True
    assert [(each["name"], each["kind"], each["mode"]) for each in listed["entries"]] == [("motd", "file", "0644")]


async def test_a_reader_that_goes_away(api: Rest) -> None:
    """The download ends with it, and nothing waits for ever."""
    await api.run("web")
    api.host.files["/big"] = bytes(64 << 20)
    async with api.http.stream("GET", "/v1/machines/web/file", params={"path": "/big"}) as answer:
        assert len(await anext(answer.aiter_bytes())) > 0
    assert (await api.http.get("/v1/machines/web")).status_code == 200


async def test_progress_as_events(api: Rest) -> None:
    async with api.http.stream("POST", "/v1/machines", json={}, headers={"Accept": "text/event-stream"}) as answer:
        kinds = [line[7:] async for line in answer.aiter_lines() if line.startswith("event: ")]
    assert kinds[-1] == "result" and set(kinds[:-1]) <= {"progress"}
    name = (await api.http.get("/v1/machines")).json()[0]["name"]
    asked = {"json": {"name": name}, "headers": {"Accept": "text/event-stream"}}
    async with api.http.stream("POST", "/v1/machines", **asked) as answer:
        lines = [line async for line in answer.aiter_lines()]
    assert lines[0] == "event: problem" and json.loads(lines[1][6:])["status"] == 409


async def test_events(api: Rest) -> None:
    web = await api.run("web")
    found = (await api.http.get("/v1/events")).json()
    assert web["id"] in {each["subject"] for each in found}
    after = found[0]["sequence"]
    assert (await api.http.get("/v1/events", params={"after": after, "limit": 1})).json() == found[1:2]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(found[-1]["sequence"])}
    async with api.http.stream("GET", "/v1/events", headers=headers) as answer:
        lines = answer.aiter_lines()
        await api.http.post("/v1/machines/web/pause")
        first = int((await anext(lines)).removeprefix("id: "))
        assert first > found[-1]["sequence"]
        assert (await anext(lines)).startswith("event: ")
    is_problem(await api.http.get("/v1/events", headers={"Last-Event-ID": "-1"}), 400, "invalid-request")


async def test_tokens_on_a_port() -> None:
    """On TCP nobody is let in without a token, and the token goes on to the controller."""
    async with rest(token_needed=True) as api:
        assert (await api.http.get("/v1/health")).status_code == 200
        for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            answer = await api.http.get("/v1/machines", headers=headers)
            is_problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(InvalidStatus):
            async with connect(api, "/v1/machines/web/exec"):
                pass
        twice = [("Authorization", "Bearer fp_a"), ("Authorization", "Bearer fp_b")]
        is_problem(await api.http.get("/v1/machines", headers=twice), 400, "invalid-request")
        large = await api.http.get("/v1/machines", headers={"Authorization": "Bearer " + "x" * 20_000})
        assert large.status_code == 400
        unknown = await api.http.get("/v1/machines", headers={"Authorization": "Bearer fp_a"})
        is_problem(unknown, 401, "unauthenticated")  # the controller says so
        async with Forky(api.settings.home, start=False) as operator:
            _, viewer = await operator.create_token(Role.VIEWER)
        headers = {"Authorization": f"Bearer {viewer}"}
        assert (await api.http.get("/v1/machines", headers=headers)).json() == []
        is_problem(await api.http.post("/v1/machines", json={}, headers=headers), 403, "permission-denied")


async def test_headers_become_metadata(api: Rest) -> None:
    """The caller's credentials and idempotency key reach the controller with each call, and nobody else's do."""
    seen: list[dict[str, str]] = []

    class Seeing(controller_pb2_grpc.ControllerServicer):
        async def ListMachines(self, request: Any, context: Any) -> controller_pb2.ListMachinesResponse:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            return controller_pb2.ListMachinesResponse()

        async def UntagSnapshot(self, request: Any, context: Any) -> common_pb2.Snapshot:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            return common_pb2.Snapshot(kind=common_pb2.SNAPSHOT_KIND_KEPT)

    with home() as settings:
        server = grpc.aio.server()
        controller_pb2_grpc.add_ControllerServicer_to_server(Seeing(), server)
        server.add_insecure_port(f"unix:{settings.socket('controller')}")
        await server.start()
        async with Forky(settings.home, start=False, token="", tenant="", wrap_channel=CallerChannel) as forky:  # type: ignore[arg-type]
            app = make_app(forky, token_needed=False)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://forky") as http:
                headers = {"Authorization": "Bearer fp_a", "Idempotency-Key": "k1", "Forky-Tenant": "t"}
                await asyncio.gather(
                    http.get("/v1/machines", headers=headers),
                    http.delete("/v1/tags/t", headers=headers),
                    http.get("/v1/machines", headers={"X-Other": "y"}),
                )
        await server.stop(None)
    carried = {(each.get("authorization"), each["idempotency-key"] == "k1", each.get("forky-tenant")) for each in seen}
    # The key is for the call that changes something. Others, and callers without one, have the SDK's own.
    assert carried == {("Bearer fp_a", True, "t"), ("Bearer fp_a", False, "t"), (None, False, None)}


def test_generated_clients_have_a_class_for_each_schema() -> None:
    """They name it by its title, and leave out both of two that are called the same, with all that has them."""
    schemas = json.loads(openapi_text())["components"]["schemas"]
    titles = [schema.get("title", name) for name, schema in schemas.items()]
    assert [title for title in titles if titles.count(title) > 1] == []


def test_the_document_is_current() -> None:
    kept = Path(__file__).parents[2] / "docs/openapi.json"
    assert kept.read_text() == openapi_text(), "docs/openapi.json is out of date: run `make openapi`"


def test_every_error_has_a_status() -> None:
    """One that is added to errors.py and to gRPC's table has one here too."""
    assert set(wire_status.STATUS.values()) <= set(problems.STATUS)
    assert all(400 <= number < 600 for number in problems.STATUS.values())
