"""REST and MCP with real machines: what an agent and a program do."""

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mcp import Client, StdioServerParameters
from websockets.asyncio.client import unix_connect

from tests.live.conftest import IMAGES, Instance, new_instance

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def served() -> Iterator[Instance]:
    """An instance whose `forky up` starts the REST API."""
    import subprocess

    assert IMAGES.is_dir()
    instance = new_instance(FORKY_REST="unix")
    try:
        instance.ok("up")
        yield instance
    finally:
        instance.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


async def test_an_agent_breaks_its_machine_and_goes_back(served: Instance) -> None:
    argv = served.inside(sys.executable, "-m", "forkypig.cli.main", "mcp")
    parameters = StdioServerParameters(command=argv[0], args=argv[1:], env=served.environment)
    async with Client(parameters, read_timeout_seconds=300) as client:

        async def call(tool: str, **arguments: Any) -> dict[str, Any]:
            answer = await client.call_tool(tool, arguments)
            assert not answer.is_error, answer.content
            assert answer.structured_content is not None
            return answer.structured_content

        await call("run_machine", name="work")
        await call("write_file", machine="work", path="/root/plan", content="go on\n")
        await call("exec", machine="work", command="nohup sleep 1000 >/dev/null 2>&1 &")
        before = await call("exec", machine="work", command="pgrep -x sleep; cat /root/plan")
        assert before["exit_code"] == 0
        await call("snapshot", machine="work", tag="works", message="before the risky thing")
        broken = await call("exec", machine="work", command="pkill -x sleep; rm -rf /root /usr/bin/cat; cat /root/plan")
        assert broken["exit_code"] == 127
        await call("restore", machine="work", snapshot="works")
        after = await call("exec", machine="work", command="pgrep -x sleep; cat /root/plan")
        assert (after["exit_code"], after["stdout"]) == (0, before["stdout"]), after
        names = [entry["name"] for entry in (await call("list_files", machine="work"))["entries"]]
        assert "plan" in names
        late = await call("exec", machine="work", command="sleep 30", timeout_s=0.5)
        assert late["timed_out"] and "longer timeout_s" in late["note"]
        child = (await call("fork", source="works", name="again"))["children"][0]["name"]
        assert (await call("read_file", machine=child, path="/root/plan"))["content"] == "go on\n"


async def test_rest(served: Instance) -> None:
    socket = str(served.home / "run/rest.sock")
    transport = httpx.AsyncHTTPTransport(uds=socket)
    async with httpx.AsyncClient(transport=transport, base_url="http://forky", timeout=300) as http:
        made = await http.post("/v1/machines", json={"name": "web"})
        assert made.status_code == 201, made.text
        done = (await http.post("/v1/machines/web/exec", json={"argv": ["hostname"]})).json()
        assert (done["exit_code"], done["stdout"]) == (0, "web\n")
        data = bytes(range(256)) * 8192
        put = await http.put("/v1/machines/web/file", params={"path": "/root/data"}, content=data)
        assert put.status_code == 204, put.text
        assert (await http.get("/v1/machines/web/file", params={"path": "/root/data"})).content == data
        archive = (await http.get("/v1/machines/web/archive", params={"path": "/root"})).content
        back = await http.put("/v1/machines/web/archive", params={"path": "/tmp"}, content=archive)
        assert back.status_code == 200, back.text
        bad = await http.put("/v1/machines/web/archive", params={"path": "/tmp"}, content=b"no archive at all" * 100)
        assert bad.status_code == 400, bad.text
        listed = (await http.get("/v1/machines/web/directory", params={"path": "/tmp/root"})).json()
        assert "data" in [entry["name"] for entry in listed["entries"]]
        missing = await http.get("/v1/machines/web/directory", params={"path": "/none"})
        assert missing.headers["content-type"] == "application/problem+json"
        children = (await http.post("/v1/machines/web/fork", json={"count": 2})).json()["children"]
        names = [child["name"] for child in children]
        said = await asyncio.gather(
            *(http.post(f"/v1/machines/{name}/exec", json={"argv": ["hostname"]}) for name in names)
        )
        assert [each.json()["stdout"].strip() for each in said] == names
        assert (await http.get("/v1/machines/web/console")).status_code == 200
        async with unix_connect(socket, "ws://forky/v1/machines/web/exec", proxy=None) as terminal:
            start = {"argv": ["sh"], "stdin": True, "terminal": {"rows": 24, "columns": 80}}
            await terminal.send(json.dumps(start))
            await terminal.send(b"stty size; exit 7\n")
            messages = [message async for message in terminal]
        output = b"".join(message[1:] for message in messages if isinstance(message, bytes))
        assert b"24 80" in output
        assert json.loads(messages[-1])["exit"]["code"] == 7
