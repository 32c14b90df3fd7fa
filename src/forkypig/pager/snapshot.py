"""One snapshot in the pager: its state and its files."""

import asyncio
import errno
from enum import Enum

import structlog

from forkypig.chunks.format import PAGE_BYTES
from forkypig.model import SnapshotId
from forkypig.pager.frozen import FrozenMemory
from forkypig.pager.index import PageIndex, PageRun
from forkypig.pager.layers import Layer
from forkypig.pager.prefetch import Recording
from forkypig.pager.served import FileKind, ServedFile

log = structlog.get_logger()

NODES = 4  # of a snapshot: its directory, then its files


def node_of(snapshot_id: str) -> int:
    """The node of a snapshot's directory: the same in every process; 1 is the root's."""
    return (int(snapshot_id.removeprefix("s-"), 16) + 1) * NODES


class State(Enum):
    """Where the memory of a snapshot is."""

    RESERVED = "reserved"  # still changing, in a machine that runs: reading waits
    FROZEN = "frozen"  # in a process that was stopped for ever
    PACKED = "packed"  # in the chunk store
    LOST = "lost"  # it was in a frozen process, and that ended: reading fails
    FORGOTTEN = "forgotten"


_READABLE = (State.FROZEN, State.PACKED)


class Snapshot:
    """A snapshot and its files. It has its memory from the start."""

    def __init__(
        self,
        snapshot_id: SnapshotId,
        memory: PageIndex,
        size_bytes: int,
        parent: "Snapshot | None",
        parent_id: str,
    ) -> None:
        self.id, self.node, self.size_bytes = snapshot_id, node_of(snapshot_id), size_bytes
        self.parent, self.parent_id = parent, parent_id  # the object only until it is packed
        self.state = State.RESERVED
        self.standing: set[str] = set()  # snapshots that are not packed and stand directly on it
        self.frozen: FrozenMemory | None = None
        self.address = 0
        self.layer: Layer | None = None
        self.names: set[int] = set()  # layers that its index names, or may name as long as it is not complete
        self.packed_own_bytes = 0  # once it is packed: what it held itself
        self.recording = Recording()
        self.push_later: tuple[PageRun, ...] = ()  # when the load is over
        self.memory = ServedFile(snapshot_id, FileKind.MEMORY, self.node + 1, size_bytes, memory)
        self.files = {FileKind.MEMORY: self.memory}
        self._waiting: asyncio.Future[None] | None = None

    def add_file(self, kind: FileKind, size_bytes: int) -> ServedFile:
        """Offers its disk or its device state, once it is stored."""
        node = self.node + 1 + list(FileKind).index(kind)
        index = PageIndex(size_bytes if kind is FileKind.DISK else 0, 0, None, None)
        index.stored_as = self.id, kind.value
        file = self.files[kind] = ServedFile(self.id, kind, node, size_bytes, index)
        return file

    def file_of(self, node: int) -> ServedFile | None:
        """The file with this node."""
        return next((file for file in self.files.values() if file.node == node), None)

    @property
    def own_bytes(self) -> int:
        """Memory that is not its parent's, as far as the index is made."""
        return self.packed_own_bytes or self.memory.index.own_page_count * PAGE_BYTES

    def enter(self, state: State) -> None:
        """Changes the state, and lets those read (or fail) who wait for it."""
        log.info("snapshot", snapshot=self.id, state=state.value, was=self.state.value)
        self.state = state
        if self._waiting is not None and state is not State.RESERVED:
            self._waiting.set_result(None)
            self._waiting = None

    @property
    def is_readable(self) -> bool:
        """Whether it need not be waited for."""
        return self.state in _READABLE

    async def readable(self) -> None:
        """Waits until it is bound. Raises OSError (EIO) when it is lost or forgotten."""
        while self.state is State.RESERVED:
            if self._waiting is None:
                self._waiting = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._waiting)
        if self.state not in _READABLE:
            raise OSError(errno.EIO, f"the memory of {self.id} is {self.state.value}")
