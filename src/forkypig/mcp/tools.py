"""What the tools have in common: their arguments, what they may do, and how their errors are told."""

import functools
from collections.abc import Awaitable, Callable
from typing import Annotated, ParamSpec, TypeVar

from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

from forkypig import errors
from forkypig.sdk.client import Forky

P = ParamSpec("P")
R = TypeVar("R")
Connect = Callable[[], Awaitable[Forky]]

MachineName = Annotated[str, Field(description="name or id of a machine", min_length=1, max_length=63)]
SnapshotName = Annotated[str, Field(description="tag or id of a snapshot", min_length=1, max_length=63)]
TimeToLive = Annotated[
    float, Field(ge=0, le=2_592_000, description="seconds after its last use when it is removed; 0: it stays")
]
GuestPath = Annotated[str, Field(description="absolute path in the machine", pattern=r"^/", max_length=4096)]
LOOKS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
MAKES = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
DESTROYS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
RUNS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=True)


def told(tool: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """Our errors as the model reads them."""

    @functools.wraps(tool)
    async def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await tool(*arguments, **named)
        except errors.NotFound as error:
            raise ToolError(f"{error} (list_machines, list_snapshots and list_files say what there is)") from error
        except errors.ForkyError as error:
            raise ToolError(str(error)) from error

    return call
