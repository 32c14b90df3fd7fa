"""The tools that work in a machine: commands and files. What is long is cut to what fits into a model's context."""

import base64
import contextlib
import posixpath
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from forkypig.mcp import results
from forkypig.mcp.tools import DESTROYS, LOOKS, RUNS, Connect, GuestPath, MachineName, told
from forkypig.sdk import file_list, streams
from forkypig.sdk.limited import exec_limited

# About 10,000 tokens of each stream.
_MOST_OUTPUT_BYTES = 40_000
_MOST_READ_BYTES = 100_000
_MOST_ENTRIES = 500
_MOST_TIMEOUT_S = 3600.0


def add_inside(server: MCPServer[Any], connect: Connect) -> None:
    """Tools that work in a machine."""

    @server.tool(name="exec", annotations=RUNS)
    @told
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

    @server.tool(annotations=LOOKS)
    @told
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

    @server.tool(annotations=DESTROYS)
    @told
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

    @server.tool(annotations=LOOKS)
    @told
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
