"""`forky mcp` as a process, driven by the MCP client over stdio, before a real controller whose host is made up."""

import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from forkypig.daemon.server import PidFile
from forkypig.sdk import local
from tests.component.controller_rig import home, serving
from tests.component.rest_rig import GuestHost, running_guests


@dataclass
class Agent:
    """An agent's side."""

    client: Client
    host: GuestHost

    async def ok(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A tool's structured result."""
        answer = await self.client.call_tool(tool, arguments)
        assert not answer.is_error, answer.content
        assert answer.structured_content is not None
        return answer.structured_content

    async def fails(self, tool: str, **arguments: Any) -> str:
        """What a tool that fails says."""
        answer = await self.client.call_tool(tool, arguments)
        assert answer.is_error, answer.structured_content
        return str(answer.content[0].text)


@pytest.fixture
async def host() -> AsyncIterator[tuple[str, GuestHost]]:
    with home() as settings:
        async with running_guests(settings) as made, serving(settings):
            held = [PidFile(settings.pid_file(daemon)) for daemon in local.DAEMONS]
            yield str(settings.home), made
            for pid_file in held:
                os.close(pid_file._fd)


def server(where: str) -> StdioServerParameters:
    environment = {**os.environ, "FORKY_HOME": where}
    return StdioServerParameters(command=sys.executable, args=["-m", "forkypig.cli.main", "mcp"], env=environment)


async def test_what_an_agent_does(host: tuple[str, GuestHost]) -> None:
    async with Client(server(host[0]), read_timeout_seconds=60) as client:
        agent = Agent(client, host[1])
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {
            *("run_machine", "list_machines", "fork", "remove", "exec", "read_file", "write_file", "list_files"),
            *("snapshot", "restore", "list_snapshots", "log"),
        }
        for tool in tools.values():
            assert tool.description and tool.output_schema, tool.name
            assert all("description" in each or "title" in each for each in tool.input_schema["properties"].values())
        assert tools["remove"].annotations.destructive_hint and tools["log"].annotations.read_only_hint
        assert "context" not in tools["run_machine"].input_schema["properties"]
        assert (await agent.ok("run_machine", name="web", egress="deny"))["state"] == "running"
        done = await agent.ok("exec", machine="web", command="echo hi", stdin="!")
        assert (done["exit_code"], done["stdout"], done["note"]) == (0, "sh -c echo hi!", None)
        assert (await agent.ok("snapshot", machine="web", tag="clean", message="works"))["tag"] == "clean"
        children = (await agent.ok("fork", source="web", count=2, name="try", ttl_s=60))["children"]
        assert all(child["expires_us"] for child in children)
        assert [child["name"] for child in children] == ["try-1", "try-2"]
        assert (await agent.ok("restore", machine="web", snapshot="clean"))["name"] == "web"
        assert [each["tag"] for each in (await agent.ok("list_snapshots"))["snapshots"]] == ["clean"]
        assert (await agent.ok("log", source="web"))["snapshots"][0]["tag"] == "clean"
        await agent.ok("remove", name="try-1")
        names = [machine["name"] for machine in (await agent.ok("list_machines"))["machines"]]
        assert names == ["web", "try-2"]


async def test_files(host: tuple[str, GuestHost]) -> None:
    async with Client(server(host[0]), read_timeout_seconds=60) as client:
        agent = Agent(client, host[1])
        await agent.ok("run_machine", name="web")
        assert (await agent.ok("write_file", machine="web", path="/root/a", content="grüße"))["bytes"] == 7
        assert agent.host.files["/root/a"] == "grüße".encode()
        whole = await agent.ok("read_file", machine="web", path="/root/a")
        assert (whole["content"], whole["complete"]) == ("grüße", True)
        part = await agent.ok("read_file", machine="web", path="/root/a", limit=3)  # in the middle of ü
        assert (part["content"], part["next_offset"], part["complete"]) == ("gr", 2, False)
        rest = await agent.ok("read_file", machine="web", path="/root/a", offset=2)
        assert (rest["content"], rest["complete"]) == ("üße", True)
        await agent.ok("write_file", machine="web", path="/root/b", content="AP8=", encoding="base64")
        binary = await agent.ok("read_file", machine="web", path="/root/b")
        assert (binary["content"], binary["encoding"]) == ("AP8=", "base64")
        agent.host.files["/big"] = bytes(1 << 20)
        assert (await agent.ok("read_file", machine="web", path="/big", limit=1000))["complete"] is False
        assert [each["name"] for each in (await agent.ok("list_files", machine="web"))["entries"]] == ["motd"]


async def test_what_goes_wrong_says_what_to_do(host: tuple[str, GuestHost]) -> None:
    async with Client(server(host[0]), read_timeout_seconds=60) as client:
        agent = Agent(client, host[1])
        assert "list_machines" in await agent.fails("exec", machine="nobody", command="true")
        await agent.ok("run_machine", name="web")
        assert "choose another name" in await agent.fails("run_machine", name="web")
        assert "egress" in await agent.fails("run_machine", egress="somewhere")
        assert "path" in await agent.fails("read_file", machine="web", path="relative")
        assert "count" in await agent.fails("fork", source="web", count=0)
        assert await agent.fails("read_file", machine="web", path="/none")
        assert "base64" in await agent.fails("write_file", machine="web", path="/a", content="%", encoding="base64")
        assert await agent.fails("exec", machine="a/../\0" + "x" * 10_000, command="true")
        flood = await agent.ok("exec", machine="web", command="flood")
        assert "left out in the middle" in flood["note"]
        assert len(flood["stdout"]) < 50_000
