"""Snapshots that travel, and the store's upkeep: what `Forky` has of it, in a class of its own that it inherits from.

Files are read and written here, by whoever calls; secret keys stay here too. Tar's framing of the first two files of an
export is made here for that reason; docs/sharing.md has the format.
"""

import asyncio
import contextlib
import os
import tarfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import grpc

from forkypig import errors, model, signatures
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import calls
from forkypig.sdk.whole_file import write_whole
from forkypig.v1 import store_pb2 as pb
from forkypig.v1 import store_pb2_grpc
from forkypig.wire import convert
from forkypig.wire.ending import Ending

if TYPE_CHECKING:
    from forkypig.v1.store_pb2_grpc import StoreAsyncStub

OnProgress = Callable[[model.Progress], None]
_PIECE_BYTES = 1 << 20
_OUR_VARIABLES = "AWS_"


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer did."""

    snapshot: model.Snapshot
    was_there: bool  # nothing had to be done
    chunks: int  # that were new where they went
    bytes: int  # of them, compressed


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    bytes: int


@dataclass(frozen=True, slots=True)
class RemoteSnapshot:
    """A snapshot in an object store."""

    id: str
    tag: str
    message: str
    created_us: int
    own_memory_bytes: int
    own_disk_bytes: int
    is_here: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did, or would do."""

    snapshots: int
    chunks_kept: int
    packs_removed: int
    packs_rewritten: int
    freed_bytes: int
    more_bytes: int  # a dry run: that writing packs anew would free besides
    problems: Sequence[str]


@dataclass(frozen=True, slots=True)
class CheckedStore:
    """What a check found."""

    packs: int
    chunks: int
    stored_bytes: int
    snapshots: int
    problems: Sequence[tuple[str, str]]  # what is damaged (a pack, a snapshot's id), and how


class Storing:
    """The part of `Forky` that is about the store."""

    socket: Endpoint

    @property
    def channel(self) -> grpc.aio.Channel:
        """The open channel."""
        raise NotImplementedError

    @property
    def _store(self) -> "StoreAsyncStub":
        return store_pb2_grpc.StoreStub(self.channel)

    async def export_snapshot(
        self,
        snapshot: str,
        target: str | Path | IO[bytes],
        *,
        with_image: bool = True,
        sign: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Exported:
        """Writes a snapshot, given by id, beginning of an id, or tag, to a file that `import_snapshot` reads, with the
        image that it stands on. A path is written whole or not at all. `sign`: the file of a secret key.

        Raises NotFound, NotPossibleNow, Damaged, InvalidRequest (the key), OSError."""
        request = pb.ExportRequest(snapshot=snapshot, with_image=with_image)
        parts = _followed(self.socket, self._store.ExportSnapshot(request), on_progress)
        async with contextlib.aclosing(_contents(parts, Path(sign) if sign is not None else None)) as contents:
            if isinstance(target, str | Path):
                return Exported(await write_whole(Path(target), contents))
            size = 0
            async for content in contents:
                await asyncio.to_thread(target.write, content)
                size += len(content)
            return Exported(size)

    async def import_snapshot(
        self,
        source: str | Path | IO[bytes],
        *,
        tag: str = "",
        trust: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        """Takes a snapshot in. "": it keeps its tag, if that is free here. `trust`: the file of the public key that
        must have signed it. One that is here already is fine (`was_there`).

        Raises Damaged, InvalidRequest (a newer format, the signature), NotPossibleNow (the image is missing),
        AlreadyExists (the tag), ResourceExhausted, OSError."""
        trusted = signatures.load_public(Path(trust)) if trust is not None else b""
        options = pb.ImportOptions(tag=tag, trusted=trusted)
        with _opened(source) as file:
            call = self._store.ImportSnapshot(_upload(options, file))
            return await self._transferred(call, on_progress)

    async def push_snapshot(
        self,
        snapshot: str,
        url: str,
        *,
        environment: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        """Sends a snapshot to `file:///DIRECTORY` or `s3://BUCKET/PREFIX`: what is not there yet. `environment`: where
        AWS_ACCESS_KEY_ID and so on are from; None: our own. Raises NotFound, NotPossibleNow (the tag is another
        snapshot's there), InvalidRequest (the URL, the keys), HostUnreachable, ResourceExhausted."""
        request = pb.PushRequest(snapshot=snapshot, url=url, environment=_variables(environment))
        return await self._transferred(self._store.PushSnapshot(request), on_progress)

    async def pull_snapshot(
        self,
        url: str,
        name: str,
        *,
        tag: str = "",
        environment: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        """Fetches a snapshot, given by id or tag: what is not here yet. See `push_snapshot` and `import_snapshot`."""
        request = pb.PullRequest(url=url, name=name, tag=tag, environment=_variables(environment))
        return await self._transferred(self._store.PullSnapshot(request), on_progress)

    async def remote_snapshots(
        self, url: str, *, environment: Mapping[str, str] | None = None
    ) -> Sequence[RemoteSnapshot]:
        """What was pushed there, oldest first."""
        request = pb.ListRemoteRequest(url=url, environment=_variables(environment))
        with calls(self.socket):
            answer = await self._store.ListRemote(request)
        return [
            RemoteSnapshot(
                each.id,
                each.tag,
                each.message,
                each.created_us,
                each.own_memory_bytes,
                each.own_disk_bytes,
                each.is_here,
            )
            for each in answer.snapshots
        ]

    async def collect(self, *, dry_run: bool = False, on_progress: OnProgress | None = None) -> Collected:
        """Removes from the store what no snapshot and no running transfer needs. Raises Busy, Damaged."""
        call = self._store.CollectStore(pb.CollectRequest(dry_run=dry_run))
        async for update in _followed(self.socket, call, on_progress):
            done = update.result
            return Collected(
                done.snapshots,
                done.chunks_kept,
                done.packs_removed,
                done.packs_rewritten,
                done.freed_bytes,
                done.more_bytes,
                tuple(done.problems),
            )
        raise errors.InternalError("the collection ended without a result: the daemons' logs say more")

    async def check_store(self, *, deep: bool = False, on_progress: OnProgress | None = None) -> CheckedStore:
        """Whether all is there that the snapshots need; `deep` reads every chunk besides. Changes nothing."""
        call = self._store.CheckStore(pb.CheckStoreRequest(deep=deep))
        async for update in _followed(self.socket, call, on_progress):
            done = update.result
            problems = tuple((problem.subject, problem.text) for problem in done.problems)
            return CheckedStore(done.packs, done.chunks, done.stored_bytes, done.snapshots, problems)
        raise errors.InternalError("the check ended without a result: the daemons' logs say more")

    async def _transferred(self, call: Any, on_progress: OnProgress | None) -> Transferred:
        async for update in _followed(self.socket, call, on_progress):
            done = update.result
            snapshot = convert.snapshot_from_wire(done.snapshot)
            return Transferred(snapshot, done.was_there, done.chunks, done.bytes)
        raise errors.InternalError("the transfer ended without a result: the daemons' logs say more")


async def _followed(socket: Endpoint, call: Any, on_progress: OnProgress | None) -> AsyncGenerator[Any, None]:
    """What a stream says besides progress."""
    # Only what is written to can lose its end.
    ending = Ending(call) if isinstance(call, grpc.aio.StreamStreamCall) else contextlib.nullcontext()
    try:
        with calls(socket), ending:
            async for message in call:
                if not message.HasField("progress"):
                    yield message
                elif on_progress is not None:
                    on_progress(convert.progress_from_wire(message.progress))
    finally:
        call.cancel()


async def _contents(parts: AsyncGenerator[Any, None], key: Path | None) -> AsyncGenerator[bytes, None]:
    """The file of an export."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            if part.HasField("head"):
                yield _file("head", part.head)
                if key is not None:
                    yield _file("signature", signatures.sign(key, part.head))
            else:
                yield part.data


def _file(name: str, content: bytes) -> bytes:
    """A file in a tar file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _opened(source: str | Path | IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A file by its path, or one that is open and stays so."""
    return Path(source).open("rb") if isinstance(source, str | Path) else contextlib.nullcontext(source)


async def _upload(options: pb.ImportOptions, file: IO[bytes]) -> AsyncGenerator[pb.ImportPart, None]:
    yield pb.ImportPart(options=options)
    while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield pb.ImportPart(data=piece)


def _variables(environment: Mapping[str, str] | None) -> dict[str, str]:
    """What a place needs of the environment."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if name.startswith(_OUR_VARIABLES)}
