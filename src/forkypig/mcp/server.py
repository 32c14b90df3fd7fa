"""The tools. Each is one or two calls of the SDK; what an agent can't know is in the descriptions and the errors.

Nothing is connected or started before the first call.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from pydantic import Field

from forkypig import model
from forkypig.mcp import results
from forkypig.mcp.inside import add_inside
from forkypig.mcp.tools import DESTROYS, LOOKS, MAKES, Connect, MachineName, SnapshotName, TimeToLive, told
from forkypig.sdk.client import Forky

INSTRUCTIONS = """Forky Pig runs virtual machines that fork like processes. A machine is a whole Linux computer of
yours: root, Debian, its own disk and network. Typical work: run_machine, exec in it, snapshot before anything risky,
restore when it broke (memory, processes and disk are again what they were), fork to try several ways at once, each in a
copy of its own, remove what is no longer needed or let it go by itself (ttl_s). Machines go by name or id, snapshots by
tag or id."""


class Connection:
    """One connection for all calls, opened at the first."""

    def __init__(self) -> None:
        self._forky: Forky | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> Forky:
        """The connection; the daemons are started if they don't run."""
        async with self._lock:
            if self._forky is None:
                self._forky = await Forky().connect()
            return self._forky

    async def close(self) -> None:
        if self._forky is not None:
            await self._forky.close()


def make_server(connect: Connect | None = None) -> MCPServer[Any]:
    """The server. `connect` gives the connection of a call; None: one of its own for all."""
    own = Connection()
    connect = connect or own.get

    @contextlib.asynccontextmanager
    async def lifespan(_: MCPServer[Any]) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await own.close()

    server: MCPServer[Any] = MCPServer(
        "forky", title="Forky Pig", instructions=INSTRUCTIONS, lifespan=lifespan, log_level="WARNING"
    )
    _life(server, connect)
    _history(server, connect)
    add_inside(server, connect)
    return server


def _life(server: MCPServer[Any], connect: Connect) -> None:
    """Tools that make, list and remove machines."""

    @server.tool(annotations=MAKES)
    @told
    async def run_machine(
        context: Context[Any, Any],
        name: Annotated[str, Field(description="a-z, 0-9 and -; empty: one is chosen")] = "",
        snapshot: Annotated[str, Field(description="start from this one instead of a fresh image: tag or id")] = "",
        image: Annotated[str, Field(description="name or id; empty: Debian")] = "",
        cpus: Annotated[int, Field(ge=0, le=256, description="0: the default")] = 0,
        memory_mib: Annotated[int, Field(ge=0, le=1 << 20, description="0: the default, 512")] = 0,
        egress: Annotated[
            str, Field(description="where its connections may go: allow, deny, or networks like 10.0.0.0/8,1.2.3.4/32")
        ] = "allow",
        ttl_s: TimeToLive = 0.0,
    ) -> results.Machine:
        """Make a machine and wait until it is ready: a Linux computer with root, from an image or a snapshot.

        Takes a second from a template, minutes the very first time, when the image is built."""
        forky = await connect()
        config = model.ConfigChange(egress=model.Egress.parse(egress) if egress != "allow" else None)
        telling: list[asyncio.Task[None]] = []

        def show(progress: model.Progress) -> None:
            told = context.report_progress(progress.done, progress.total or None, progress.step)
            telling.append(asyncio.create_task(told))

        try:
            made = await forky.run(
                image,
                name=name,
                cpus=cpus,
                memory_mib=memory_mib,
                snapshot=snapshot,
                config=config,
                ttl_s=ttl_s,
                on_progress=show,
            )
        finally:
            await asyncio.gather(*telling, return_exceptions=True)
        return results.Machine.of(made)

    @server.tool(annotations=LOOKS)
    @told
    async def list_machines() -> results.Machines:
        """List all machines, oldest first, with state, address and where they came from."""
        forky = await connect()
        return results.Machines(machines=[results.Machine.of(machine) for machine in await forky.list()])

    @server.tool(annotations=MAKES)
    @told
    async def fork(
        source: Annotated[str, Field(description="machine (name or id) or snapshot (tag or id) to copy")],
        count: Annotated[int, Field(ge=1, le=100, description="how many children")] = 1,
        name: Annotated[str, Field(description="children are NAME-1, NAME-2, …; empty: as the source")] = "",
        ttl_s: TimeToLive = 0.0,
    ) -> results.Fork:
        """Copy a running machine, with memory, processes and disk, into children that go on from this very instant.

        The source goes on too. Use it to try several ways at once. Children have a network address of their own; their
        inherited connections are reset."""
        made = await (await connect()).fork(source, count, name=name, ttl_s=ttl_s)
        return results.Fork(snapshot=made.snapshot.id, children=[results.Machine.of(child) for child in made.children])

    @server.tool(annotations=DESTROYS)
    @told
    async def remove(
        name: Annotated[str, Field(description="a machine's name or id, or a snapshot's tag or id")],
        kind: Annotated[Literal["machine", "snapshot"], Field(description="which of the two it is")] = "machine",
    ) -> results.Removed:
        """Remove a machine with its disk, or a snapshot. It can't be had back. Snapshots of a removed machine stay."""
        forky = await connect()
        if kind == "machine":
            await (await forky.get(name)).remove()
        else:
            await forky.remove_snapshot(name)
        return results.Removed(removed=f"{kind} {name}")


def _history(server: MCPServer[Any], connect: Connect) -> None:
    """Tools that keep what a machine is, and go back to it."""

    @server.tool(annotations=MAKES)
    @told
    async def snapshot(
        machine: MachineName,
        tag: Annotated[str, Field(description="a name for it: a-z, 0-9 and -; empty: it is known by its id")] = "",
        message: Annotated[str, Field(description="what it is, for later readers", max_length=4000)] = "",
    ) -> results.Snapshot:
        """Keep a machine as it is now: memory, processes and disk. It goes on after some milliseconds.

        Do this before anything that may break it; restore goes back."""
        forky = await connect()
        return results.Snapshot.of(await (await forky.get(machine)).snapshot(tag, message=message))

    @server.tool(annotations=DESTROYS)
    @told
    async def restore(
        machine: MachineName,
        snapshot: SnapshotName,
        keep_tag: Annotated[str, Field(description="first keep what it is now, under this tag; empty: lose it")] = "",
    ) -> results.Machine:
        """Let a machine go back to a snapshot in place: memory, processes and disk are what they were then.

        Its name and address stay. What happened since is lost, unless keep_tag is given."""
        forky = await connect()
        found = await forky.get(machine)
        await found.restore(snapshot, keep_tag=keep_tag)
        return results.Machine.of(found)

    @server.tool(annotations=LOOKS)
    @told
    async def list_snapshots(
        kept_only: Annotated[bool, Field(description="leave out those that forks and runs made for themselves")] = True,
    ) -> results.Snapshots:
        """List snapshots, oldest first; `parent` says which came from which."""
        every = await (await connect()).snapshots()
        shown = [each for each in every if not kept_only or each.kind is model.SnapshotKind.KEPT]
        return results.Snapshots(snapshots=[results.Snapshot.of(each) for each in shown])

    @server.tool(annotations=LOOKS)
    @told
    async def log(
        source: Annotated[str, Field(description="a machine (name or id) or a snapshot (tag or id)")],
    ) -> results.Snapshots:
        """List what a machine or a snapshot stands on: its history of snapshots, newest first."""
        found = await (await connect()).history(source)
        return results.Snapshots(snapshots=[results.Snapshot.of(each) for each in found])
