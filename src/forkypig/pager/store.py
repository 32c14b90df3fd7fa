"""All snapshots of the pager, and what can be done to them. Everything here runs on the event loop."""

import asyncio
import contextlib
import itertools
import select
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from forkypig.errors import AlreadyExists, InvalidRequest, NotFound, NotPossibleNow
from forkypig.model.ids import check_id
from forkypig.pager import frozen, prefetch
from forkypig.pager.index import PAGE_BYTES, PageIndex, PageRun
from forkypig.pager.layers import LayerTable
from forkypig.pager.saved import Shelf
from forkypig.pager.settling import Settling
from forkypig.pager.snapshot import Snapshot, State, assemble

log = structlog.get_logger()

_LARGEST_BYTES = 1 << 44
# The index is completed in the background when the load is over, at the latest this long after Bind.
_COMPLETE_AFTER_S = 2.0
# The guest's first moments after a load, in which it stands still for each page that it needs.
_START_S = 0.4
_REGIONS_A_STEP = 8  # 16 MiB, about 0.2 ms: what a fault may wait meanwhile


class Store:
    """The snapshots by id and by inode."""

    def __init__(self, layers: Path, mount: Path) -> None:
        """`layers` is the directory of layer files, `mount` where the FUSE file system is."""
        self.layers = LayerTable(layers)
        self.shelf = Shelf(layers, self.layers)
        self.snapshots: dict[str, Snapshot] = {}
        self.by_inode: dict[int, Snapshot] = {}
        self.on_forget: Callable[[Snapshot], None] = lambda _: None  # the file system drops the kernel's entry
        self._mount = mount
        self._next_inode = 2  # 1 is the root; a snapshot's directory is even, its file the next odd; never used again
        self._completing: dict[str, asyncio.Task[None]] = {}
        self._settling: dict[str, Settling] = {}
        self._pusher = ThreadPoolExecutor(1, "push")
        self._pusher.submit(int)  # starts the thread: hostd raises the priority of those that are there at a split
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = itertools.count()
        self._last_touched: dict[int, tuple[PageRun, ...]] = {}  # by size: for snapshots without a parent

    # -- what hostd asks -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Offers all settled snapshots again. Before the event loop has anything else to do: it reads files."""
        for snapshot in self.shelf.load():
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
        path = self._mount / snapshot_id / "memory"
        if self._is_known(snapshot_id, size_bytes, parent_id, pid, address):
            return path
        parent = self._parent(parent_id, size_bytes)
        # /proc/<pid>/maps needs a lock of that process, which one of its page faults may hold: not on the event loop.
        memory = await asyncio.to_thread(frozen.open_frozen, pid, address, size_bytes, parent_id)
        try:
            if self._is_known(snapshot_id, size_bytes, parent_id, pid, address):
                memory.close()
                return path
            parent = self._parent(parent_id, size_bytes)
            layer = self.layers.add(snapshot_id, memory)
        except BaseException:
            memory.close()
            raise
        snapshot = Snapshot(snapshot_id, size_bytes, parent, parent_id)
        snapshot.frozen, snapshot.address, snapshot.layer = memory, address, layer
        snapshot.index = PageIndex(size_bytes, layer.number, parent.index if parent else None, memory)
        snapshot.names = {layer.number} | (parent.names if parent else set())
        self.layers.use(snapshot.names, snapshot_id)
        if parent is not None:
            parent.standing.add(snapshot_id)
        self._offer(snapshot)
        asyncio.get_running_loop().add_reader(memory.pidfd, self._process_ended, snapshot)
        log.info("reserved", snapshot=snapshot_id, parent=parent_id, pid=pid, mib=size_bytes >> 20)
        return path

    def bind(self, snapshot_id: str) -> None:
        """The process is frozen: serve from it. This is inside the machine's pause."""
        snapshot = self.get(snapshot_id)
        if snapshot.state in (State.FROZEN, State.SETTLED):
            return
        if snapshot.state is not State.RESERVED or snapshot.frozen is None or _has_ended(snapshot.frozen.pidfd):
            raise NotPossibleNow(f"the memory of {snapshot_id} can't be served: the process that holds it has ended")
        ahead = snapshot.parent.recording.runs if snapshot.parent else self._last_touched.get(snapshot.size_bytes, ())
        at_once, snapshot.push_later = prefetch.split(ahead, next(self._turns))
        snapshot.recording.start(at_once)
        snapshot.enter(State.FROZEN)
        if at_once:
            self._spawn(self._push(snapshot, at_once))
        loop = asyncio.get_running_loop()
        loop.call_later(_COMPLETE_AFTER_S, self._complete_soon, snapshot)

    def end_of_load(self, snapshot_id: str) -> None:
        """The load is over, and the machine runs."""
        snapshot = self.get(snapshot_id)
        later, snapshot.push_later = snapshot.push_later, ()
        if snapshot.state is State.FROZEN and later:
            snapshot.recording.expect(later)
            self._spawn(self._push(snapshot, later))
        asyncio.get_running_loop().call_later(_START_S, self._started, snapshot)

    def _started(self, snapshot: Snapshot) -> None:
        """What a start touches is known."""
        snapshot.recording.stop()
        runs = self._last_touched[snapshot.size_bytes] = snapshot.recording.runs
        log.info("started", snapshot=snapshot.id, touched_pages=sum(n for _, n in runs))
        self._complete_soon(snapshot)

    async def settle(self, snapshot_id: str) -> Settling:
        """Copies its own pages to its layer, after those of the ancestors that it needs. One at a time a snapshot;
        a second caller follows the first one's. Returns what can be followed and awaited."""
        snapshot = self.get(snapshot_id)
        if snapshot.state is State.RESERVED:
            raise NotPossibleNow(f"{snapshot_id} can't be settled: its machine is not frozen yet")
        if snapshot.state is State.LOST:
            raise NotPossibleNow(f"{snapshot_id} can't be settled: the frozen process that held its memory has ended")
        running = self._settling.get(snapshot_id)
        if running is None:
            running = Settling(snapshot)
            if snapshot.state is State.SETTLED:
                running.finish_at_once()
                return running
            self._settling[snapshot_id] = running
            running.task = asyncio.create_task(self._settle(snapshot, running), name=f"settle-{snapshot_id}")
            running.task.add_done_callback(lambda task: self._settling_ended(snapshot_id, task))
        return running

    def open(self, snapshot_id: str, size_bytes: int, parent_id: str) -> None:
        """Checks that a settled snapshot is offered (`load` has done it)."""
        snapshot = self.get(snapshot_id)
        if (snapshot.size_bytes, snapshot.parent_id) != (size_bytes, parent_id):
            raise InvalidRequest(f"{snapshot_id} is another snapshot than the pager knows: {snapshot.size_bytes} bytes")
        if snapshot.state is State.LOST:
            raise NotPossibleNow(f"the memory of {snapshot_id} is lost: a layer that it needs is gone or damaged")

    async def forget(self, snapshot_id: str) -> None:
        """Forgets a snapshot; its layer stays while others need it. Raises NotPossibleNow when its memory is still in
        its frozen process and others stand on it."""
        snapshot = self.snapshots.get(snapshot_id)
        if snapshot is None:
            return
        others = (snapshot.layer.users | snapshot.standing) - {snapshot_id}
        if snapshot.state is State.FROZEN and others:
            raise NotPossibleNow(
                f"{snapshot_id} can't be forgotten: its memory is still in the frozen process, and "
                f"{', '.join(sorted(others)[:3])} need it; settle it first"
            )
        settling = self._settling.get(snapshot_id)
        if settling is not None and settling.task is not None:
            settling.task.cancel()
            await asyncio.wait({settling.task})
        if self.snapshots.pop(snapshot_id, None) is None:
            return  # somebody was faster
        self.by_inode.pop(snapshot.inode, None)
        self._unwatch(snapshot)
        snapshot.enter(State.FORGOTTEN)
        self.on_forget(snapshot)
        self._released_if_unneeded(snapshot)
        self._no_longer_stands(snapshot)

    async def close(self) -> None:
        """Ends what goes on in the background. The snapshots stay where they are."""
        tasks = [*self._tasks, *self._completing.values()]
        tasks += [settling.task for settling in self._settling.values() if settling.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._pusher.shutdown(wait=False, cancel_futures=True)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _is_known(self, snapshot_id: str, size_bytes: int, parent_id: str, pid: int, address: int) -> bool:
        """Whether the same was reserved already. Raises AlreadyExists when something else was."""
        known = self.snapshots.get(snapshot_id)
        if known is None:
            if self.layers.of(snapshot_id) is not None:
                raise AlreadyExists("snapshot", snapshot_id)  # an orphan layer has the id still
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
        if parent.state not in (State.FROZEN, State.SETTLED):
            raise NotPossibleNow(f"nothing can stand on {parent_id}: its memory is {parent.state.value}")
        return parent

    def _offer(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.id] = snapshot
        snapshot.inode = self._next_inode + 1
        self._next_inode += 2
        self.by_inode[snapshot.inode] = snapshot

    async def _push(self, snapshot: Snapshot, ahead: tuple[PageRun, ...]) -> None:
        """Pushes pages from a thread. Who holds them is found here, since indexes change on the event loop only."""
        parts = {}
        for first, count in ahead:
            offset, length = first * PAGE_BYTES, count * PAGE_BYTES
            with contextlib.suppress(OSError):
                parts[offset] = partial(assemble, self.layers, snapshot.runs(offset, length), length, wait=True)
        work = partial(prefetch.push, snapshot.inode, ahead, lambda offset, _: parts[offset]())
        stored, took_ms = await self.layers.in_thread(self._pusher, work)
        log.debug("pushed", snapshot=snapshot.id, kib=stored >> 10, ms=round(took_ms, 2))

    def _complete_soon(self, snapshot: Snapshot) -> asyncio.Task[None] | None:
        """Completes the index in the background, if it is not complete."""
        if snapshot.index.complete or snapshot.state is not State.FROZEN:
            return None
        task = self._completing.get(snapshot.id)
        if task is None:
            task = asyncio.create_task(self._complete(snapshot), name=f"complete-{snapshot.id}")
            self._completing[snapshot.id] = task
            task.add_done_callback(lambda _: self._completing.pop(snapshot.id, None))
        return task

    async def _complete(self, snapshot: Snapshot) -> None:
        parent = snapshot.parent
        if parent is not None and (task := self._complete_soon(parent)) is not None:
            await asyncio.wait({task})
        try:
            for position in range(0, snapshot.index.regions, _REGIONS_A_STEP):
                snapshot.index.complete_step(position, _REGIONS_A_STEP)
                await asyncio.sleep(0)
        except OSError as error:
            log.warning("index not completed", snapshot=snapshot.id, error=str(error))
            return
        snapshot.index.all_made()
        exact = snapshot.index.named() | {snapshot.layer.number}
        surplus, snapshot.names = snapshot.names - exact, exact
        self.layers.release(surplus, snapshot.id)

    async def _settle(self, snapshot: Snapshot, settling: Settling) -> None:
        if (completing := self._complete_soon(snapshot)) is not None:
            await asyncio.wait({completing})
        if not snapshot.index.complete:
            raise NotPossibleNow(f"{snapshot.id} can't be settled: a process that holds its memory has ended")
        for number in sorted(snapshot.names - {snapshot.layer.number}):
            # An index on disk may name only layers on disk, so the ancestors go first.
            if self.layers[number].source is None:
                raise NotPossibleNow(
                    f"{snapshot.id} can't be settled: it needs {self.layers[number].snapshot}, which is lost"
                )
            ancestor = self.snapshots.get(self.layers[number].snapshot)
            if ancestor is not None and ancestor.state is not State.SETTLED:
                await (await self.settle(ancestor.id)).done()
        await settling.copy(self.shelf)
        with settling.disk_errors(self.shelf):
            source = await self.shelf.save(snapshot)
        self._unwatch(snapshot)
        self.layers.replace(snapshot.layer, source)
        snapshot.frozen = None
        snapshot.enter(State.SETTLED)
        self._no_longer_stands(snapshot)

    def _settling_ended(self, snapshot_id: str, task: asyncio.Task[None]) -> None:
        self._settling.pop(snapshot_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:  # whoever follows raises it
            log.warning("not settled, served from its frozen process", snapshot=snapshot_id, error=str(error))

    def _process_ended(self, snapshot: Snapshot) -> None:
        """The process of a snapshot ended before the snapshot was settled."""
        self._unwatch(snapshot)
        if snapshot.frozen is None or snapshot.frozen.outlives_process or snapshot.state is State.RESERVED:
            log.warning(
                "process ended before its snapshot was settled", snapshot=snapshot.id, state=snapshot.state.value
            )
            return
        log.error(
            "snapshot lost: its frozen process ended",
            snapshot=snapshot.id,
            pid=snapshot.frozen.pid,
            needed_by=",".join(sorted(snapshot.layer.users - {snapshot.id})),
        )
        self.layers.replace(snapshot.layer, None)
        snapshot.frozen = None
        snapshot.enter(State.LOST)

    def _unwatch(self, snapshot: Snapshot) -> None:
        if snapshot.frozen is not None:
            asyncio.get_running_loop().remove_reader(snapshot.frozen.pidfd)

    def _no_longer_stands(self, snapshot: Snapshot) -> None:
        """`snapshot` is settled or forgotten: its parent's index need not be kept for it."""
        parent, snapshot.parent = snapshot.parent, None
        if parent is not None:
            parent.standing.discard(snapshot.id)
            if parent.state is State.FORGOTTEN:
                self._released_if_unneeded(parent)

    def _released_if_unneeded(self, snapshot: Snapshot) -> None:
        """What is left of a forgotten snapshot goes. While unsettled snapshots stand on it its files stay: with them
        they can be offered again after a restart."""
        if not snapshot.standing:
            self.shelf.unlink_index(snapshot.id)
            names, snapshot.names = snapshot.names, set()
            self.layers.release(names, snapshot.id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
