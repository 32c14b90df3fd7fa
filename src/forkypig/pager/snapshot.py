"""One snapshot in the pager: its state, and reading its memory."""

import asyncio
import errno
import time
from enum import Enum
from functools import partial

import structlog

from forkypig.pager.frozen import FrozenMemory
from forkypig.pager.index import PAGE_BYTES, PageIndex, PageRun
from forkypig.pager.layers import Layer, LayerTable, WouldBlock
from forkypig.pager.prefetch import Recording

log = structlog.get_logger()

Run = tuple[int, int, int]  # owner, offset in bytes, length in bytes


class State(Enum):
    """Where the memory of a snapshot is."""

    RESERVED = "reserved"  # still changing, in a machine that runs: reading waits
    FROZEN = "frozen"  # in a process that was stopped for ever
    SETTLED = "settled"  # in layer files
    LOST = "lost"  # it was in a frozen process, and that ended: reading fails
    FORGOTTEN = "forgotten"


_READABLE = (State.FROZEN, State.SETTLED)


class Snapshot:
    """The memory of a snapshot. `read` is what a page fault waits for."""

    def __init__(self, snapshot_id: str, size_bytes: int, parent: "Snapshot | None", parent_id: str) -> None:
        self.id, self.size_bytes = snapshot_id, size_bytes
        self.parent, self.parent_id = parent, parent_id  # the object only until the index is complete
        self.state = State.RESERVED
        self.inode = 0
        self.standing: set[str] = set()  # unsettled snapshots that stand directly on it
        self.frozen: FrozenMemory | None = None
        self.address = 0
        self.layer: Layer
        self.index: PageIndex
        self.names: set[int] = set()  # layers that its index names, or may name as long as it is not complete
        self.recording = Recording()
        self.push_later: tuple[PageRun, ...] = ()  # when the load is over
        self.reads = self.read_bytes = 0
        self._waiting: asyncio.Future[None] | None = None

    @property
    def own_bytes(self) -> int:
        """Of its layer, as far as the index is made."""
        return self.index.own_page_count * PAGE_BYTES

    def enter(self, state: State) -> None:
        """Changes the state, and lets those read (or fail) who wait for it."""
        log.info("snapshot", snapshot=self.id, state=state.value, was=self.state.value)
        self.state = state
        if self._waiting is not None and state is not State.RESERVED:
            self._waiting.set_result(None)
            self._waiting = None

    async def read(self, layers: LayerTable, offset: int, length: int) -> bytes:
        """Its memory; waits until it is bound. Raises OSError (EIO) when it is lost or forgotten."""
        while self.state is State.RESERVED:
            if self._waiting is None:
                self._waiting = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiting)
        if self.state not in _READABLE:
            raise OSError(errno.EIO, f"the memory of {self.id} is {self.state.value}")
        length = min(length, self.size_bytes - offset)
        self.reads += 1
        self.read_bytes += length
        if self.recording.on:
            self.recording.add(offset, length, time.monotonic())
        runs = self.runs(offset, length)
        try:
            return assemble(layers, runs, length, wait=False)
        except WouldBlock:
            return await layers.in_thread(None, partial(assemble, layers, runs, length, wait=True))

    def runs(self, offset: int, length: int) -> list[Run]:
        """Who holds [offset, offset + length): runs of pages of one owner."""
        first = offset // PAGE_BYTES
        last = -(-(offset + length) // PAGE_BYTES)
        end = offset + length
        runs: list[Run] = []
        owners = self.index.owners(first, last - first)
        start, current = offset, owners[0] if owners else 0
        for page, owner in enumerate(owners, first):
            if owner != current:
                runs.append((current, start, page * PAGE_BYTES - start))
                start, current = page * PAGE_BYTES, owner
        if end > start:
            runs.append((current, start, end - start))
        return runs


def assemble(layers: LayerTable, runs: list[Run], length: int, *, wait: bool) -> bytes:
    """The content of `runs`, which are `length` bytes in all. Raises OSError, or WouldBlock without `wait`."""
    if len(runs) == 1:
        owner, offset, _ = runs[0]
        if not owner:
            return bytes(length)
        source = layers[owner].source
        if source is None:
            raise OSError(errno.EIO, "a layer is lost")
        return source.read(offset, length, wait=wait)
    data = bytearray(length)
    view = memoryview(data)
    at = 0
    for owner, offset, count in runs:
        if owner:
            source = layers[owner].source
            if source is None:
                raise OSError(errno.EIO, "a layer is lost")
            source.read_into(view[at : at + count], offset, wait=wait)
        at += count
    return data  # type: ignore[return-value]  # a buffer is all that FUSE needs: no copy
