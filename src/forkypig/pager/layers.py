"""Layer files, and the table that gives each layer the number by which indexes name it.

A layer is a sparse file of the snapshot's size with its own pages at their own offsets. It may outlive its snapshot:
as long as the index of a descendant names it, it stays («orphan layer»).
"""

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from forkypig.errors import ResourceExhausted

_T = TypeVar("_T")
_MOST_LAYERS = 0xFFFF  # numbers are uint16, and 0 is «no owner»


class WouldBlock(Exception):
    """The data is not in memory: read it from a thread, with `wait`."""


class Source(Protocol):
    """Where the pages of a layer are. Offsets are of guest memory. Raises OSError, or WouldBlock without `wait`."""

    def read(self, offset: int, length: int, *, wait: bool) -> bytes: ...
    def read_into(self, view: memoryview, offset: int, *, wait: bool) -> None: ...
    def close(self) -> None: ...


class LayerFile:
    """A settled layer. Without `wait` only what the page cache holds is read, so that the event loop never waits
    for a disk (preadv2(2), RWF_NOWAIT)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._flags = os.RWF_NOWAIT

    def read(self, offset: int, length: int, *, wait: bool) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data), offset, wait=wait)
        return data  # type: ignore[return-value]  # a buffer is all that FUSE needs; no copy

    def read_into(self, view: memoryview, offset: int, *, wait: bool) -> None:
        if wait:
            done = 0
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the layer file is shorter than it was")
                done += count
            return
        if not self._flags:
            raise WouldBlock
        try:
            count = os.preadv(self._fd, [view], offset, self._flags)
        except BlockingIOError as error:
            raise WouldBlock from error
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._flags = 0  # this file system knows no RWF_NOWAIT: always from a thread
            raise WouldBlock from error
        if count != len(view):
            raise WouldBlock

    def close(self) -> None:
        os.close(self._fd)


class Layer:
    """The pages of one snapshot, wherever they are."""

    __slots__ = ("number", "path", "snapshot", "source", "users")

    def __init__(self, number: int, snapshot: str, path: Path, source: Source | None) -> None:
        self.number, self.snapshot, self.path, self.source = number, snapshot, path, source
        self.users: set[str] = set()  # snapshots whose index names it, or may


class LayerTable:
    """All layers by number. Numbers are used again when no index names them any more."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers: list[Layer | None] = [None]
        self._free: list[int] = []
        self._by_snapshot: dict[str, Layer] = {}
        self._threads: set[asyncio.Future[Any]] = set()

    def __getitem__(self, number: int) -> Layer:
        layer = self._layers[number]
        assert layer is not None
        return layer

    def path(self, snapshot: str) -> Path:
        return self._directory / f"{snapshot}.layer"

    def add(self, snapshot: str, source: Source | None) -> Layer:
        """A layer for a snapshot. Raises ResourceExhausted beyond 65535."""
        if not self._free and len(self._layers) > _MOST_LAYERS:
            raise ResourceExhausted(f"the host holds {_MOST_LAYERS} snapshots, more it can't: remove some first")
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._layers)
            self._layers.append(None)
        layer = Layer(number, snapshot, self.path(snapshot), source)
        self._layers[number] = self._by_snapshot[snapshot] = layer
        return layer

    def of(self, snapshot: str) -> Layer | None:
        """The layer of a snapshot, also when only the layer is left of it."""
        return self._by_snapshot.get(snapshot)

    def use(self, numbers: set[int], user: str) -> None:
        for number in numbers:
            self[number].users.add(user)

    def release(self, numbers: set[int], user: str) -> None:
        """The index of `user` does not name these layers any more: what nobody names goes, also from the disk."""
        for number in numbers:
            layer = self[number]
            layer.users.discard(user)
            if not layer.users:
                self._drop(layer)

    async def in_thread(self, executor: Executor | None, work: Callable[[], _T]) -> _T:
        """Runs what reads sources on a thread; no source is closed under it."""
        future = asyncio.get_running_loop().run_in_executor(executor, work)
        self._threads.add(future)
        future.add_done_callback(self._threads.discard)
        return await asyncio.shield(future)

    def replace(self, layer: Layer, source: Source | None) -> None:
        """The pages of a layer are elsewhere now, or (None) lost."""
        old, layer.source = layer.source, source
        if old is not None:
            self._retire(old)

    def _retire(self, source: Source) -> None:
        """Closes a source when no thread can be reading it any more: its descriptors' numbers will be used again."""
        pending = set(self._threads)

        def done(future: asyncio.Future[Any]) -> None:
            pending.discard(future)
            if not pending:
                source.close()

        for future in self._threads:
            future.add_done_callback(done)
        if not pending:
            source.close()

    def _drop(self, layer: Layer) -> None:
        self.replace(layer, None)
        layer.path.unlink(missing_ok=True)
        self._layers[layer.number] = None
        self._by_snapshot.pop(layer.snapshot, None)
        self._free.append(layer.number)

    def close(self) -> None:
        for layer in self._layers:
            if layer is not None and layer.source is not None:
                layer.source.close()
