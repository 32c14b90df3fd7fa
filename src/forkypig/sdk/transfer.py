"""Files into and out of a machine: tar archives made and read in a thread, carried by the Agent service.

The thread and the loop meet in one read or write at a time, so nothing piles up between a fast side and a slow one.
"""

import asyncio
import concurrent.futures
import errno
import io
import posixpath
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import grpc

from forkypig import errors
from forkypig.sdk import archive
from forkypig.sdk.address import Endpoint
from forkypig.sdk.connection import QUICK_S, calls, translated
from forkypig.v1 import agent_pb2, agent_pb2_grpc
from forkypig.wire.ending import Ending

_T = TypeVar("_T")
OnBytes = Callable[[int, int], None]  # bytes so far, bytes in all (0: not known)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy made. `left_out` names, with reasons, what was not copied (links that lead out, devices)."""

    files: int
    bytes: int
    left_out: tuple[str, ...] = ()


# A copy may take hours, but not one step of it: that long a machine may swap, or be paused by mistake.
_STALL_S = 300.0
_PIECE_BYTES = 1 << 20  # of one message


class _Broken(OSError):
    """The call under the archive ended; its status says why."""


class Threaded(io.RawIOBase):
    """A file for the archive's thread whose bytes are carried by coroutines of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()

    def wait(self, make: Callable[[], Awaitable[_T]]) -> _T:
        """What `make` awaits on the loop; for the thread. Raises DeadlineExceeded, OSError when the call has ended."""

        async def run() -> _T:
            async with asyncio.timeout(_STALL_S):
                return await make()

        try:
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result()
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"the copy stood still for {_STALL_S:.0f} s and was given up: see whether the machine still answers"
            ) from error
        except (concurrent.futures.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _Broken(errno.EPIPE, "the call ended") from error


class _Source(Threaded):
    """Reads the data of a Download."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[agent_pb2.DownloadRequest, agent_pb2.DownloadResponse]) -> None:
        super().__init__()
        self._call, self._rest = call, memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end; a negative size is not for streams."""
        gathered = bytearray()
        while len(gathered) < size:
            if not self._rest:
                response = self.wait(self._call.read)
                if not isinstance(response, agent_pb2.DownloadResponse):
                    break
                self._rest = memoryview(response.data)
            take = size - len(gathered)
            gathered += self._rest[:take]
            self._rest = self._rest[take:]
        return bytes(gathered)


class _Sink(Threaded):
    """Writes the data of an Upload."""

    def __init__(self, call: grpc.aio.StreamUnaryCall[agent_pb2.UploadRequest, agent_pb2.UploadResponse]) -> None:
        super().__init__()
        self._call = call

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.wait(lambda: self._call.write(agent_pb2.UploadRequest(data=bytes(data))))
        return len(data)


def guest_path(path: str) -> str:
    """`path` without what is superfluous. Raises InvalidRequest when it is not absolute."""
    if not path.startswith("/") or "\0" in path:
        raise errors.InvalidRequest(f"«{path}» is not an absolute path: paths in a machine begin with /")
    clean = posixpath.normpath(path)
    return clean[1:] if clean.startswith("//") else clean


class Transfer:
    """The file verbs of one machine."""

    def __init__(self, channel: grpc.aio.Channel, socket: Endpoint, machine: str, name: str) -> None:
        self._stub = agent_pb2_grpc.AgentStub(channel)
        self._socket, self._machine, self._name = socket, machine, name

    async def stat(self, path: str) -> agent_pb2.StatPathResponse:
        request = agent_pb2.StatPathRequest(machine=self._machine, path=guest_path(path))
        with calls(self._socket):
            return await self._stub.StatPath(request, timeout=QUICK_S)

    async def download(self, path: str, target: Path, on_bytes: OnBytes | None) -> Copied:
        """As cp: into `target` if it is a directory, else as `target`."""
        path = guest_path(path)
        if path == "/":
            raise errors.InvalidRequest("the whole of a machine can't be copied: name a directory below /")
        is_directory = await asyncio.to_thread(target.is_dir)
        final = target / posixpath.basename(path) if is_directory else target
        if not await asyncio.to_thread(final.parent.is_dir):
            raise errors.NotFound("directory", str(final.parent), "make it first")
        info = await self.stat(path)
        if not info.exists:
            raise errors.NotFound("file", f"{self._name}:{path}")
        total = 0 if info.directory else info.size_bytes
        unpacker = archive.Unpacker(final, _counter(on_bytes, total))
        made = await self._receive(path, unpacker.unpack)
        return Copied(made.files, made.bytes, tuple(made.left_out))

    async def download_into(self, path: str, file: IO[bytes], on_bytes: OnBytes | None) -> int:
        """The content of one file into `file`; how many bytes it was. Raises InvalidRequest for a directory."""
        path = guest_path(path)
        advance = _counter(on_bytes, 0)

        def unpack(stream: IO[bytes]) -> int:
            for tar, entry in archive.entries(stream):
                if not entry.isreg():
                    raise errors.InvalidRequest(f"{self._name}:{path} is not a file: copy it to a directory instead")
                archive.copy_content(tar, entry, file, advance)
                return entry.size
            raise errors.InternalError(f"the machine sent nothing for {path}")

        return await self._receive(path, unpack)

    async def _receive(self, path: str, unpack: Callable[[IO[bytes]], _T]) -> _T:
        """Runs `unpack` in a thread on the archive of `path`."""
        request = agent_pb2.DownloadRequest(machine=self._machine, path=path)
        call = self._stub.Download(request)
        source = _Source(call)
        try:
            return await _in_thread(lambda: unpack(source), call.cancel)  # type: ignore[arg-type]
        except (_Broken, tarfile.TarError) as error:
            # The archive broke off because the call did; the call knows better why.
            if call.done():
                with calls(self._socket):
                    await call.read()
            raise errors.InternalError(
                f"the copy of {path} broke off: what the machine sent is no whole archive ({error})"
            ) from error
        except BrokenPipeError:
            raise  # the caller's own file: whoever read it has gone
        except OSError as error:
            raise _local(error) from error
        finally:
            call.cancel()

    async def upload(self, source: Path, path: str, on_bytes: OnBytes | None) -> Copied:
        """As cp: into `path` if it is a directory there, else as `path`."""
        if not await asyncio.to_thread(source.exists):
            raise errors.NotFound("file", str(source))
        is_directory = await asyncio.to_thread(source.is_dir)
        real = await asyncio.to_thread(source.resolve)  # "." and ".." have names too
        into, name = await self._place(path, real.name if source.name in ("", "..") else source.name, is_directory)
        total = await asyncio.to_thread(archive.tree_bytes, source) if on_bytes else 0
        advance = _counter(on_bytes, total)
        return await self._send(into, lambda sink: archive.pack(source, name, sink, advance))

    async def upload_from(self, file: IO[bytes], size: int, path: str, mode: int, on_bytes: OnBytes | None) -> Copied:
        """`size` bytes of `file` as the file `path`."""
        info = await self.stat(path)
        if info.exists and info.directory:
            raise errors.InvalidRequest(f"{self._name}:{path} is a directory: name a file in it")
        into, name = posixpath.split(guest_path(path))
        advance = _counter(on_bytes, size)
        return await self._send(into, lambda sink: archive.pack_file(file, name, size, mode, sink, advance))

    async def download_archive(self, path: str) -> AsyncGenerator[bytes, None]:
        """The tar stream of a file or a tree, as it comes."""
        call = self._stub.Download(agent_pb2.DownloadRequest(machine=self._machine, path=path))
        try:
            async for response in translated(self._socket, call):
                yield response.data
        finally:
            call.cancel()

    async def upload_archive(self, directory: str, pieces: AsyncIterator[bytes]) -> Copied:
        """Has the guest unpack a tar stream in `directory`."""
        call = self._stub.Upload()
        ending = Ending(call)
        try:
            try:
                start = agent_pb2.UploadStart(machine=self._machine, directory=directory)
                await call.write(agent_pb2.UploadRequest(start=start))
                async for piece in pieces:
                    for at in range(0, len(piece), _PIECE_BYTES):
                        await call.write(agent_pb2.UploadRequest(data=piece[at : at + _PIECE_BYTES]))
                await call.done_writing()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the call has ended, and awaiting it tells why
            with calls(self._socket), ending:
                response = await call
        finally:
            call.cancel()
        return Copied(response.files, response.bytes)

    async def _place(self, path: str, name: str, is_directory: bool) -> tuple[str, str]:
        """The directory in the guest to unpack into, and the name to have there."""
        clean = guest_path(path)
        info = await self.stat(clean)
        if info.exists and info.directory:
            return clean, name
        if info.exists and is_directory:
            raise errors.InvalidRequest(f"{self._name}:{clean} is a file and can't become a directory")
        if path.endswith("/") and not is_directory:
            raise errors.NotFound("directory", f"{self._name}:{clean}", "make it first")
        return posixpath.split(clean)

    async def _send(self, directory: str, pack: Callable[[IO[bytes]], None]) -> Copied:
        """Runs `pack` in a thread, and has the guest unpack in `directory` what it writes."""
        call = self._stub.Upload()
        ending = Ending(call)
        sink = _Sink(call)
        try:
            start = agent_pb2.UploadStart(machine=self._machine, directory=directory)
            try:
                await call.write(agent_pb2.UploadRequest(start=start))
                await _in_thread(lambda: pack(sink), call.cancel)  # type: ignore[arg-type]
                await call.done_writing()
            except (_Broken, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the call has ended, and awaiting it tells why
            with calls(self._socket), ending:
                response = await call
        except OSError as error:
            raise _local(error) from error
        finally:
            call.cancel()
        return Copied(response.files, response.bytes)


async def _in_thread(work: Callable[[], _T], cancel: Callable[[], object]) -> _T:
    """Runs `work` in a thread; when we are cancelled, ends the call under it and waits until the thread is out."""
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel()
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # it broke because we ended its call: nothing new
        raise


def _counter(on_bytes: OnBytes | None, total: int) -> archive.Advance:
    """Adds up, and tells the caller; runs in the archive's thread."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(done, total)

    return advance


def _local(error: OSError) -> errors.ForkyError:
    """What went wrong on our own side of a copy."""
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.ResourceExhausted(f"the copy broke off: {what}; make room and copy again")
    return errors.NotPossibleNow(f"the copy broke off: {what}")
