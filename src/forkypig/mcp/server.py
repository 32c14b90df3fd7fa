"""The tools. Each is one or two calls of the SDK; what an agent can't know is in the descriptions and the errors.

Output is cut to what fits into a model's context, and says so. Nothing is connected or started before the first call.
"""

import asyncio
import base64
import contextlib
import functools
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

from forkypig import errors, model
from forkypig.mcp import results
from forkypig.sdk import file_list, streams
from forkypig.sdk.client import Forky
from forkypig.sdk.limited import exec_limited

P = ParamSpec("P")
R = TypeVar("R")
Connect = Callable[[], Awaitable[Forky]]

# About 10,000 tokens of each stream.
_MOST_OUTPUT_BYTES = 40_000
_MOST_READ_BYTES = 100_000
_MOST_ENTRIES = 500
_MOST_TIMEOUT_S = 3600.0

INSTRUCTIONS = """Forky Pig runs virtual machines that fork like processes. A machine is a whole Linux computer of
yours: root, Debian, its own disk and network. Typical work: run_machine, exec in it, snapshot before anything risky,
restore when it broke (memory, processes and disk are again what they were), fork to try several ways at once, each in a
copy of its own, remove what is no longer needed. Machines go by name or id, snapshots by tag or id."""

MachineName = Annotated[str, Field(description="name or id of a machine", min_length=1, max_length=63)]
SnapshotName = Annotated[str, Field(description="tag or id of a snapshot", min_length=1, max_length=63)]
GuestPath = Annotated[str, Field(description="absolute path in the machine", pattern=r"^/", max_length=4096)]
_LOOKS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_MAKES = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
_DESTROYS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
_RUNS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=True)


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


def _told(tool: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """Our errors as the model reads them."""

    @functools.wraps(tool)
    async def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await tool(*arguments, **named)
        except errors.NotFound as error:
            raise ToolError(f"{error} (list_machines and list_snapshots say what there is)") from error
        except errors.ForkyError as error:
            raise ToolError(str(error)) from error

    return call


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
    _inside(server, connect)
    return server


def _life(server: MCPServer[Any], connect: Connect) -> None:
    """Tools that make, list and remove machines."""

    @server.tool(annotations=_MAKES)
    @_told
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
                on_progress=show,
            )
        finally:
            await asyncio.gather(*telling, return_exceptions=True)
        return results.Machine.of(made)

    @server.tool(annotations=_LOOKS)
    @_told
    async def list_machines() -> results.Machines:
        """List all machines, oldest first, with state, address and where they came from."""
        forky = await connect()
        return results.Machines(machines=[results.Machine.of(machine) for machine in await forky.list()])

    @server.tool(annotations=_MAKES)
    @_told
    async def fork(
        source: Annotated[str, Field(description="machine (name or id) or snapshot (tag or id) to copy")],
        count: Annotated[int, Field(ge=1, le=100, description="how many children")] = 1,
        name: Annotated[str, Field(description="children are NAME-1, NAME-2, …; empty: as the source")] = "",
    ) -> results.Fork:
        """Copy a running machine, with memory, processes and disk, into children that go on from this very instant.

        The source goes on too. Use it to try several ways at once. Children have a network address of their own; their
        inherited connections are reset."""
        made = await (await connect()).fork(source, count, name=name)
        return results.Fork(snapshot=made.snapshot.id, children=[results.Machine.of(child) for child in made.children])

    @server.tool(annotations=_DESTROYS)
    @_told
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

    @server.tool(annotations=_MAKES)
    @_told
    async def snapshot(
        machine: MachineName,
        tag: Annotated[str, Field(description="a name for it: a-z, 0-9 and -; empty: it is known by its id")] = "",
        message: Annotated[str, Field(description="what it is, for later readers", max_length=4000)] = "",
    ) -> results.Snapshot:
        """Keep a machine as it is now: memory, processes and disk. It goes on after some milliseconds.

        Do this before anything that may break it; restore goes back."""
        forky = await connect()
        return results.Snapshot.of(await (await forky.get(machine)).snapshot(tag, message=message))

    @server.tool(annotations=_DESTROYS)
    @_told
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

    @server.tool(annotations=_LOOKS)
    @_told
    async def list_snapshots(
        kept_only: Annotated[bool, Field(description="leave out those that forks and runs made for themselves")] = True,
    ) -> results.Snapshots:
        """List snapshots, oldest first; `parent` says which came from which."""
        every = await (await connect()).snapshots()
        shown = [each for each in every if not kept_only or each.kind is model.SnapshotKind.KEPT]
        return results.Snapshots(snapshots=[results.Snapshot.of(each) for each in shown])

    @server.tool(annotations=_LOOKS)
    @_told
    async def log(
        source: Annotated[str, Field(description="a machine (name or id) or a snapshot (tag or id)")],
    ) -> results.Snapshots:
        """List what a machine or a snapshot stands on: its history of snapshots, newest first."""
        found = await (await connect()).history(source)
        return results.Snapshots(snapshots=[results.Snapshot.of(each) for each in found])


def _inside(server: MCPServer[Any], connect: Connect) -> None:
    """Tools that work in a machine."""

    @server.tool(name="exec", annotations=_RUNS)
    @_told
    async def run_command(
        machine: MachineName,
        command: Annotated[str, Field(description="a shell command line, run by sh -c", min_length=1)],
        timeout_s: Annotated[float, Field(gt=0, le=_MOST_TIMEOUT_S, description="past it the command is killed")] = 60,
        directory: Annotated[str, Field(description="to run it in; empty: the user's home")] = "",
        user: Annotated[str, Field(description="empty: root")] = "",
        stdin: Annotated[str, Field(description="its standard input; empty: none")] = "",
    ) -> results.Ended:
        """Run a shell command in a machine to its end. A non-zero exit code is a result, not an error.

        There is no terminal. For what shall go on running, start it in the background: nohup CMD >LOG 2>&1 &. Long
        output is shortened in the middle: write it to a file and read that in parts."""
        found = await (await connect()).get(machine)
        done = await exec_limited(
            found,
            ["sh", "-c", command],
            most_bytes=_MOST_OUTPUT_BYTES,
            directory=directory,
            user=user,
            timeout_s=timeout_s,
            stdin=stdin.encode(errors="replace") if stdin else None,
        )
        notes = [done.failure] if done.failure else []
        if done.timed_out:
            notes.append(f"it was killed after {timeout_s:g} s: give a longer timeout_s, or start it in the background")
        if done.stdout_omitted or done.stderr_omitted:
            notes.append(
                f"{done.stdout_omitted + done.stderr_omitted} bytes were left out in the middle: write the output to a "
                "file and read it in parts"
            )
        return results.Ended(
            exit_code=done.exit_code,
            stdout=done.stdout.decode(errors="replace"),
            stderr=done.stderr.decode(errors="replace"),
            timed_out=done.timed_out,
            note="; ".join(notes) or None,
        )

    @server.tool(annotations=_LOOKS)
    @_told
    async def read_file(
        machine: MachineName,
        path: GuestPath,
        offset: Annotated[int, Field(ge=0, description="in bytes")] = 0,
        limit: Annotated[int, Field(ge=1, le=_MOST_READ_BYTES, description="in bytes")] = 50_000,
    ) -> results.FileContent:
        """Read a file of a machine, or a part of it. What is no text comes as base64."""
        found = await (await connect()).get(machine)
        kept, at = bytearray(), 0
        async with contextlib.aclosing(streams.content_of(found, path)) as pieces:
            async for piece in pieces:
                kept += piece[max(offset - at, 0) :]
                at += len(piece)
                if len(kept) > limit:
                    break
        data, complete = bytes(kept[:limit]), len(kept) <= limit
        text, length = _text(data, complete)
        return results.FileContent(
            path=path,
            content=base64.b64encode(data).decode() if text is None else text,
            encoding="base64" if text is None else "utf-8",
            offset=offset,
            complete=complete,
            next_offset=offset + (len(data) if text is None else length),
        )

    @server.tool(annotations=_DESTROYS)
    @_told
    async def write_file(
        machine: MachineName,
        path: GuestPath,
        content: str,
        encoding: Annotated[Literal["utf-8", "base64"], Field(description="of content")] = "utf-8",
        mode: Annotated[str, Field(pattern="^[0-7]{3,4}$", description="permissions in octal")] = "0644",
    ) -> results.Written:
        """Make or replace a file of a machine. Its directory must be there (exec: mkdir -p)."""
        try:
            data = content.encode() if encoding == "utf-8" else base64.b64decode(content, validate=True)
        except ValueError as error:
            raise ToolError(f"the content is not {encoding}: {error}") from error
        found = await (await connect()).get(machine)
        await found.write_file(path, data, mode=int(mode, 8))
        return results.Written(path=path, bytes=len(data))

    @server.tool(annotations=_LOOKS)
    @_told
    async def list_files(machine: MachineName, path: GuestPath = "/root") -> results.Directory:
        """List a directory of a machine."""
        found = await (await connect()).get(machine)
        entries = await file_list.directory(found, path, _MOST_ENTRIES + 1)
        made = [
            results.FileEntry(
                name=_printable(posixpath.basename(name)),
                kind=entry.kind,
                size_bytes=entry.size_bytes,
                mode=f"{entry.mode:04o}",
                target=_printable(entry.target) or None,
            )
            for name, entry in entries.items()
        ]
        return results.Directory(path=path, entries=made[:_MOST_ENTRIES], complete=len(made) <= _MOST_ENTRIES)


def _text(data: bytes, complete: bool) -> tuple[str | None, int]:
    """The data as text and how many bytes of it that is: a character that a limit cut in two is left for the next
    part. None where it is no text."""
    try:
        return data.decode(), len(data)
    except UnicodeDecodeError as error:
        if not complete and error.start > 0 and len(data) - error.start < 4:
            return data[: error.start].decode(), error.start
        return None, 0


def _printable(name: str) -> str:
    """A guest's name as text: bytes that are no UTF-8 become question marks."""
    return name.encode(errors="replace").decode()
