"""Files of a machine: contents, trees as tar archives, directories. Streams both ways, whatever the size."""

import contextlib
import posixpath
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from forkypig.rest import resources
from forkypig.rest.bodies import GuestPath, Reference
from forkypig.rest.deps import BYTES, CHANGES, Sdk
from forkypig.rest.problems import problem
from forkypig.sdk import file_list, streams

router = APIRouter(prefix="/v1/machines/{machine}", tags=["files"])
_FILE, _TAR = "application/octet-stream", "application/x-tar"
# Archives and files are streamed, never gathered; the guest's disk is their limit.
_NO_LIMIT = 1 << 62
Mode = Annotated[str, Query(pattern="^[0-7]{3,4}$", description="permission bits in octal")]


@router.get("/file", response_class=Response, responses={200: {"content": {_FILE: BYTES}}})
async def read_file(machine: Reference, path: GuestPath, forky: Sdk) -> Response:
    """The content of one file."""
    found = await forky.get(machine)
    return await _streamed(streams.content_of(found, path), _FILE)


@router.put(
    "/file",
    status_code=204,
    dependencies=CHANGES,
    response_class=Response,
    max_body_size=_NO_LIMIT,
    openapi_extra={"requestBody": {"required": True, "content": {_FILE: BYTES}}},
)
async def write_file(
    request: Request, machine: Reference, path: GuestPath, forky: Sdk, mode: Mode = "0644"
) -> Response:
    """Makes or replaces one file; its directory must be there. Content-Length must say how long it is."""
    length = request.headers.get("content-length", "")
    if not length.isascii() or not length.isdecimal():
        return problem("a file's length has to be known before: send Content-Length", status=411)
    found = await forky.get(machine)
    await streams.write_content(found, path, int(length), int(mode, 8), request.stream())
    return Response(status_code=204)


@router.get("/archive", response_class=Response, responses={200: {"content": {_TAR: BYTES}}})
async def read_archive(machine: Reference, path: GuestPath, forky: Sdk) -> Response:
    """A file or a tree as a tar archive."""
    found = await forky.get(machine)
    return await _streamed(streams.archive_of(found, path), _TAR)


@router.put(
    "/archive",
    dependencies=CHANGES,
    max_body_size=_NO_LIMIT,
    openapi_extra={"requestBody": {"required": True, "content": {_TAR: BYTES}}},
)
async def write_archive(request: Request, machine: Reference, path: GuestPath, forky: Sdk) -> resources.Unpacked:
    """Unpacks a tar archive in the directory `path`, which must be there."""
    found = await forky.get(machine)
    files, size = await streams.unpack_archive(found, path, request.stream())
    return resources.Unpacked(files=files, bytes=size)


@router.get("/directory")
async def list_directory(
    machine: Reference, path: GuestPath, forky: Sdk, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> resources.Directory:
    """The entries of a directory, in the order of their names."""
    found = await forky.get(machine)
    entries = await file_list.directory(found, path, limit + 1)
    made = [
        resources.FileEntry(
            name=posixpath.basename(name).encode(errors="replace").decode(),
            kind=entry.kind,
            mode=f"{entry.mode:04o}",
            uid=entry.uid,
            gid=entry.gid,
            size_bytes=entry.size_bytes,
            modified_ns=entry.modified_ns,
            target=entry.target.encode(errors="replace").decode() or None,
        )
        for name, entry in entries.items()
    ]
    return resources.Directory(path=path, entries=made[:limit], complete=len(made) <= limit)


async def _streamed(pieces: AsyncGenerator[bytes, None], media_type: str) -> Response:
    """The pieces as they come. What goes wrong before the first is an error; after it the connection breaks off,
    which says that the rest is missing."""
    first = await anext(pieces, b"")

    async def all_of_them() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    # A guest's file is nothing that a browser should show as a page of ours.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    return StreamingResponse(all_of_them(), media_type=media_type, headers=headers)
