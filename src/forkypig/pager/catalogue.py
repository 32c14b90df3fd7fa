"""All snapshots of the pager, and what can be done to them. Everything here runs on the event loop."""

import asyncio
import select
from collections.abc import Callable
from pathlib import Path

import structlog

from forkypig.chunks.format import PAGE_BYTES
from forkypig.errors import AlreadyExists, InvalidRequest, NotFound, NotPossibleNow
from forkypig.model import SnapshotId
from forkypig.model.ids import check_id
from forkypig.pager import frozen
from forkypig.pager.index import PageIndex
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.order import PackOrder
from forkypig.pager.packer_link import PackerLink
from forkypig.pager.packing import Packed, Packing
from forkypig.pager.prefetch import Recording
from forkypig.pager.reader_link import ReaderLink
from forkypig.pager.served import FileKind, ServedFile
from forkypig.pager.shelf import Shelf, StoredSnapshot
from forkypig.pager.snapshot import Snapshot, State
from forkypig.pager.starts import Starts
from forkypig.pager.upkeep import Upkeep, read_moved

log = structlog.get_logger()

_LARGEST_BYTES = 1 << 44
# The index is completed in the background when the load is over, at the latest this long after Bind.
_COMPLETE_AFTER_S = 2.0
_COMPLETE_AFTER_LOAD_S = 0.5
# Where a machine starts, snapshots will be made and packed: the packer is there by then. Its first moments are over.
_PACKER_AFTER_START_S = 2.0


class Catalogue:
    """The snapshots by id, and by the node of their directory."""

    def __init__(self, layers: FrozenLayers, reader: ReaderLink, starts: Starts, shelf: Shelf, mount: Path) -> None:
        self.layers, self.shelf = layers, shelf
        self.snapshots: dict[str, Snapshot] = {}
        self.by_node: dict[int, Snapshot] = {}
        self.on_frozen_change: Callable[[], None] = lambda: None  # which processes are needed has changed
        self.on_forget: Callable[[Snapshot], None] = lambda _: None  # the file system drops the kernel's entry
        self._reader, self._starts, self._mount = reader, starts, mount
        self._upkeep = Upkeep(layers, self.snapshots)
        self._packing: dict[str, Packing] = {}
        self._packer = PackerLink(shelf.directory)
        self._one_at_a_time = asyncio.Lock()
        self._replacing = asyncio.Lock()  # references of the whole catalogue change
        self._moves = 0

    # -- what hostd asks -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Offers all packed snapshots. Before the event loop has anything else to do: it reads files."""
        for stored in self.shelf.load():
            self._take(stored)

    def _take(self, stored: StoredSnapshot) -> None:
        index = PageIndex(stored.memory_bytes, 0, None, None)
        snapshot = Snapshot(stored.snapshot, index, stored.memory_bytes, None, stored.parent)
        snapshot.recording = Recording.of(self.shelf.touched(stored.snapshot))
        self._offer_stored(snapshot, stored.disk_bytes, stored.devices_bytes, stored.base)
        snapshot.enter(State.PACKED)
        self._offer(snapshot)

    def get(self, snapshot_id: str) -> Snapshot:
        """Raises NotFound."""
        found = self.snapshots.get(snapshot_id)
        if found is None:
            raise NotFound("snapshot memory", snapshot_id, "the pager was never told of it, or has forgotten it")
        return found

    async def reserve(self, snapshot_id: str, size_bytes: int, parent_id: str, pid: int, address: int) -> Path:
        """Offers the file; returns its path. The same request again is fine."""
        check_id(snapshot_id)
        path = self._mount / snapshot_id / FileKind.MEMORY.value
        if self._is_known(snapshot_id, size_bytes, parent_id, pid, address):
            return path
        parent = self._parent(parent_id, size_bytes)
        if parent is not None:
            parent.standing.add(snapshot_id)  # from here on its index stays made
        memory = None
        try:
            if parent is not None and parent.state is State.PACKED:
                await self._make_index(parent)
            # /proc/<pid>/maps needs a lock of that process, which one of its page faults may hold: on a thread.
            memory = await asyncio.to_thread(frozen.open_frozen, pid, address, size_bytes, parent_id)
            if self._is_known(snapshot_id, size_bytes, parent_id, pid, address):
                memory.close()
                return path
            if parent is not self._parent(parent_id, size_bytes):
                raise NotPossibleNow(f"{parent_id} was forgotten meanwhile")
        except BaseException:
            if memory is not None:
                memory.close()
            if parent is not None and snapshot_id not in self.snapshots:
                parent.standing.discard(snapshot_id)
            raise
        layer = self.layers.add(snapshot_id, memory)
        index = PageIndex(size_bytes, layer.number, parent.memory.index if parent else None, memory)
        snapshot = Snapshot(SnapshotId(snapshot_id), index, size_bytes, parent, parent_id)
        snapshot.frozen, snapshot.address, snapshot.layer = memory, address, layer
        snapshot.names = {layer.number} | (parent.names if parent else set())
        self.layers.use(snapshot.names, snapshot_id)
        self._offer(snapshot)
        asyncio.get_running_loop().add_reader(memory.pidfd, self._process_ended, snapshot)
        self.on_frozen_change()
        log.info("reserved", snapshot=snapshot_id, parent=parent_id, pid=pid, mib=size_bytes >> 20)
        return path

    def bind(self, snapshot_id: str) -> None:
        """The process is frozen: serve from it. This is inside the machine's pause."""
        snapshot = self.get(snapshot_id)
        if snapshot.state in (State.FROZEN, State.PACKED):
            return
        if snapshot.state is not State.RESERVED or snapshot.frozen is None or _has_ended(snapshot.frozen.pidfd):
            raise NotPossibleNow(f"the memory of {snapshot_id} can't be served: the process that holds it has ended")
        self._starts.bound(snapshot)
        snapshot.enter(State.FROZEN)
        asyncio.get_running_loop().call_later(_COMPLETE_AFTER_S, self._upkeep.complete_soon, snapshot)

    def end_of_load(self, snapshot_id: str) -> None:
        """The load is over, and the machine runs."""
        snapshot = self.get(snapshot_id)
        self._starts.end_of_load(snapshot)
        asyncio.get_running_loop().call_later(_COMPLETE_AFTER_LOAD_S, self._upkeep.complete_soon, snapshot)

    async def pack(self, snapshot_id: str, order: PackOrder) -> Packing:
        """Makes a snapshot durable; a second caller follows the first one's. Returns what can be followed."""
        snapshot = self.get(snapshot_id)
        if snapshot.state is State.RESERVED:
            raise NotPossibleNow(f"{snapshot_id} can't be packed: its machine is not frozen yet")
        if snapshot.state is State.LOST:
            raise NotPossibleNow(f"{snapshot_id} can't be packed: the frozen process that held its memory has ended")
        running = self._packing.get(snapshot_id)
        if running is None:
            running = Packing(snapshot, order)
            if snapshot.state is State.PACKED:
                return running
            self._packing[snapshot_id] = running
            running.task = asyncio.create_task(self._pack(snapshot, running), name=f"pack-{snapshot_id}")
            running.task.add_done_callback(lambda task: self._packing_ended(snapshot_id, task))
        return running

    async def open(self, snapshot_id: str, size_bytes: int, parent_id: str, base: str) -> None:
        """Checks that a packed snapshot is offered, one that was imported from now on, and learns where its base image
        lies."""
        if check_id(snapshot_id) not in self.snapshots:
            stored = await asyncio.to_thread(self.shelf.stored, SnapshotId(snapshot_id))
            if snapshot_id not in self.snapshots:
                self._take(stored)
        snapshot = self.get(snapshot_id)
        if (snapshot.size_bytes, snapshot.parent_id) != (size_bytes, parent_id):
            raise InvalidRequest(f"{snapshot_id} is another snapshot than the pager knows: {snapshot.size_bytes} bytes")
        if snapshot.state is State.LOST:
            raise NotPossibleNow(f"the memory of {snapshot_id} is lost: a process that held it has ended")
        if base and (disk := snapshot.files.get(FileKind.DISK)) is not None:
            disk.base = Path(base)

    async def move(self, path: Path) -> None:
        """Chunks are elsewhere: all references to them change. Raises InvalidRequest."""
        moved = await asyncio.to_thread(read_moved, path)
        self._moves += 1
        async with self._replacing:
            await self._upkeep.move(moved)
        await self._reader.size()  # it looks at the packs anew, and lets go of those that are about to go

    async def forget(self, snapshot_id: str) -> None:
        """Forgets a snapshot. Raises NotPossibleNow when its memory is still in its frozen process and others stand on
        it."""
        snapshot = self.snapshots.get(snapshot_id)
        if snapshot is None:
            return
        others = ((snapshot.layer.users if snapshot.layer else set()) | snapshot.standing) - {snapshot_id}
        if snapshot.state is State.FROZEN and others:
            raise NotPossibleNow(
                f"{snapshot_id} can't be forgotten: its memory is still in the frozen process, and "
                f"{', '.join(sorted(others)[:3])} need it; pack it first"
            )
        packing = self._packing.get(snapshot_id)
        if packing is not None and packing.task is not None:
            packing.task.cancel()
            await asyncio.wait({packing.task})
        if self.snapshots.pop(snapshot_id, None) is None:
            return  # somebody was faster
        self.by_node.pop(snapshot.node, None)
        self._unwatch(snapshot)
        snapshot.enter(State.FORGOTTEN)
        self.on_frozen_change()
        self.on_forget(snapshot)
        await self._released_if_unneeded(snapshot)
        await self._no_longer_stands(snapshot)

    # -- what the file system tells ------------------------------------------------------------------------------

    def opened(self, snapshot: Snapshot, file: ServedFile, *, to_write: bool) -> None:
        """A process has opened one of its files."""
        if to_write and snapshot.state is State.PACKED:
            self._starts.begins(snapshot)
        if to_write:
            asyncio.get_running_loop().call_later(_PACKER_AFTER_START_S, self._packer.start_soon)
        file.opened += 1
        file.touched = True

    def released(self, snapshot: Snapshot, file: ServedFile) -> None:
        """It has closed it, and all mappings of it."""
        file.opened -= 1
        if file.opened == 0 and snapshot.state is State.PACKED and not snapshot.standing:
            file.index.drop()

    async def close(self) -> None:
        """Ends what goes on in the background. The snapshots stay where they are."""
        tasks = self._upkeep.tasks
        tasks += [packing.task for packing in self._packing.values() if packing.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._packer.close()

    # -- steps ---------------------------------------------------------------------------------------------------

    def _is_known(self, snapshot_id: str, size_bytes: int, parent_id: str, pid: int, address: int) -> bool:
        """Whether the same was reserved already. Raises AlreadyExists when something else was."""
        known = self.snapshots.get(snapshot_id)
        if known is None:
            return False
        same = (known.size_bytes, known.parent_id) == (size_bytes, parent_id)
        if known.frozen is not None:
            same = same and (known.frozen.pid, known.address) == (pid, address)
        if not same or known.state is State.LOST:
            raise AlreadyExists("snapshot", snapshot_id)
        return True

    def _parent(self, parent_id: str, size_bytes: int) -> Snapshot | None:
        if size_bytes <= 0 or size_bytes % PAGE_BYTES or size_bytes > _LARGEST_BYTES:
            raise InvalidRequest(f"{size_bytes} bytes can't be the size of a memory: it must be pages of {PAGE_BYTES}")
        if not parent_id:
            return None
        parent = self.get(parent_id)
        if parent.size_bytes != size_bytes:
            raise InvalidRequest(f"the parent {parent_id} has {parent.size_bytes} bytes of memory, not {size_bytes}")
        if parent.state not in (State.FROZEN, State.PACKED):
            raise NotPossibleNow(f"nothing can stand on {parent_id}: its memory is {parent.state.value}")
        return parent

    async def _make_index(self, parent: Snapshot) -> None:
        try:
            await self._starts.content.make_all(parent.memory.index)
        except OSError as error:
            raise NotPossibleNow(f"nothing can stand on {parent.id}: its index can't be read ({error})") from error

    def _offer(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.id] = snapshot
        self.by_node[snapshot.node] = snapshot

    def _offer_stored(self, snapshot: Snapshot, disk_bytes: int, devices_bytes: int, base: Path | None) -> None:
        snapshot.memory.index.stored_as = snapshot.id, FileKind.MEMORY.value
        if disk_bytes:
            snapshot.add_file(FileKind.DISK, disk_bytes).base = base
        if devices_bytes:
            snapshot.add_file(FileKind.DEVICES, devices_bytes)

    async def _pack(self, snapshot: Snapshot, packing: Packing) -> None:
        if (completing := self._upkeep.complete_soon(snapshot)) is not None:
            await asyncio.wait({completing})
        if not snapshot.memory.index.complete:
            raise NotPossibleNow(f"{snapshot.id} can't be packed: a process that holds its memory has ended")
        async with self._one_at_a_time:
            for number in snapshot.names:
                if self.layers[number].memory is None:
                    raise NotPossibleNow(
                        f"{snapshot.id} can't be packed: it needs {self.layers[number].snapshot}, which is lost"
                    )
            while True:
                moves = self._moves
                try:
                    result = await packing.run(self.shelf, self.layers, self._packer)
                except NotPossibleNow:
                    if moves == self._moves:
                        raise
                    continue  # chunks that it knew of were moved meanwhile
                if moves == self._moves:
                    break
            finishing = asyncio.ensure_future(self._packed(snapshot, result))
            try:
                await asyncio.shield(finishing)
            except asyncio.CancelledError:
                await finishing  # the manifest is written: it is packed, whoever loses interest
                raise

    async def _packed(self, snapshot: Snapshot, result: Packed) -> None:
        """It is in the store: whoever names its frozen layer names chunks from now on, and the layer goes."""
        self._unwatch(snapshot)
        async with self._replacing:
            await self._upkeep.replace_layer(snapshot, result.memory)
        snapshot.frozen = None
        self._offer_stored(snapshot, result.disk_bytes, result.devices_bytes, result.base)
        snapshot.enter(State.PACKED)
        self.on_frozen_change()
        await asyncio.to_thread(self.shelf.save_touched, snapshot.id, snapshot.recording.runs)
        await self._no_longer_stands(snapshot)

    def _packing_ended(self, snapshot_id: str, task: asyncio.Task[None]) -> None:
        self._packing.pop(snapshot_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:  # whoever follows raises it
            log.warning("not packed, served from its frozen process", snapshot=snapshot_id, error=str(error))

    def _process_ended(self, snapshot: Snapshot) -> None:
        """The process of a snapshot ended before the snapshot was packed."""
        self._unwatch(snapshot)
        if snapshot.frozen is None or snapshot.frozen.outlives_process or snapshot.state is State.RESERVED:
            log.warning(
                "process ended before its snapshot was packed", snapshot=snapshot.id, state=snapshot.state.value
            )
            return
        assert snapshot.layer is not None
        log.error(
            "snapshot lost: its frozen process ended",
            snapshot=snapshot.id,
            pid=snapshot.frozen.pid,
            needed_by=",".join(sorted(snapshot.layer.users - {snapshot.id})),
        )
        snapshot.layer.lose()
        snapshot.frozen = None
        snapshot.enter(State.LOST)

    def _unwatch(self, snapshot: Snapshot) -> None:
        if snapshot.frozen is not None:
            asyncio.get_running_loop().remove_reader(snapshot.frozen.pidfd)

    async def _no_longer_stands(self, snapshot: Snapshot) -> None:
        """`snapshot` is packed or forgotten: its parent's index need not be kept for it."""
        parent, snapshot.parent = snapshot.parent, None
        if parent is not None:
            parent.standing.discard(snapshot.id)
            if parent.state is State.FORGOTTEN:
                await self._released_if_unneeded(parent)

    async def _released_if_unneeded(self, snapshot: Snapshot) -> None:
        """What is left of a forgotten snapshot goes. While others that are not packed stand on it its manifest stays:
        with it they can be offered again after a restart."""
        if not snapshot.standing:
            names, snapshot.names = snapshot.names, set()
            self.layers.release(names, snapshot.id)
            await asyncio.to_thread(self.shelf.remove, snapshot.id)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
