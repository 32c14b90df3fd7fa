"""What is done to indexes in the background, in steps so small that a fault hardly waits: completing them after a
split, and replacing a frozen layer when its pages are in the store."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import structlog

from forkypig.chunks.collect import Moved
from forkypig.chunks.format import PAGE_BYTES
from forkypig.errors import InvalidRequest
from forkypig.pager.index import References, Replaced
from forkypig.pager.layers import FrozenLayers
from forkypig.pager.snapshot import Snapshot, State

log = structlog.get_logger()

_REGIONS_A_STEP = 8  # 16 MiB, about 0.2 ms: what a fault may wait meanwhile
_REPLACED_A_STEP = 64  # 128 MiB, about 0.3 ms


class Upkeep:
    """`snapshots` are in the order in which they were made: a parent stands before its children."""

    def __init__(self, layers: FrozenLayers, snapshots: Mapping[str, Snapshot]) -> None:
        self._layers, self._snapshots = layers, snapshots
        self._completing: dict[str, asyncio.Task[None]] = {}

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What goes on."""
        return list(self._completing.values())

    def complete_soon(self, snapshot: Snapshot) -> asyncio.Task[None] | None:
        """Completes the index in the background, if it is not complete."""
        if snapshot.memory.index.complete or snapshot.state is not State.FROZEN:
            return None
        task = self._completing.get(snapshot.id)
        if task is None:
            task = asyncio.create_task(self._complete(snapshot), name=f"complete-{snapshot.id}")
            self._completing[snapshot.id] = task
            task.add_done_callback(lambda _: self._completing.pop(snapshot.id, None))
        return task

    async def _complete(self, snapshot: Snapshot) -> None:
        parent, index = snapshot.parent, snapshot.memory.index
        if parent is not None and (task := self.complete_soon(parent)) is not None:
            await asyncio.wait({task})
        try:
            for position in range(0, index.regions, _REGIONS_A_STEP):
                index.complete_step(position, _REGIONS_A_STEP)
                await asyncio.sleep(0)
        except OSError as error:
            log.warning("index not completed", snapshot=snapshot.id, error=str(error))
            return
        index.all_made()
        exact = index.layers() | ({snapshot.layer.number} if snapshot.layer else set())
        surplus, snapshot.names = snapshot.names - exact, exact
        self._layers.release(surplus, snapshot.id)

    async def replace_layer(self, snapshot: Snapshot, packed: References) -> None:
        """`packed` says for each page of a snapshot where it is stored. Its own index names only that from then on,
        and all others that name its frozen layer name these places instead; the layer is released."""
        layer = snapshot.layer
        assert layer is not None
        index = snapshot.memory.index
        snapshot.packed_own_bytes = index.own_page_count * PAGE_BYTES
        done: Replaced = {}
        for count, _ in enumerate(index.fill_packed(packed, done)):
            if count % _REPLACED_A_STEP == 0:
                await asyncio.sleep(0)
        finished: set[str] = {snapshot.id}
        # Parents first: a region that a child makes meanwhile is made of a parent's that is replaced already, or is
        # replaced when it is the child's turn.
        while left := [user for user in self._snapshots if user in layer.users - finished]:
            index = self._snapshots[left[0]].memory.index
            for count, _ in enumerate(index.replaced(layer.number, packed, done)):
                if count % _REPLACED_A_STEP == 0:
                    await asyncio.sleep(0)
            finished.add(left[0])
        for user in list(layer.users):
            if user in self._snapshots:
                self._snapshots[user].names.discard(layer.number)
            self._layers.release({layer.number}, user)
        self._layers.release(snapshot.names - {layer.number}, snapshot.id)
        snapshot.names, snapshot.layer = set(), None

    async def move(self, moved: Moved) -> None:
        """Changes all references to chunks that are elsewhere now. Raises Damaged for one that was taken."""
        done: Replaced = {}
        for snapshot in list(self._snapshots.values()):
            for file in list(snapshot.files.values()):
                for count, _ in enumerate(file.index.moved(moved.renamed, done)):
                    if count % _REPLACED_A_STEP == 0:
                        await asyncio.sleep(0)


def read_moved(path: Path) -> Moved:
    """A file that tells where chunks are (MoveRequest in pager.proto). Raises InvalidRequest."""
    try:
        with np.load(path, allow_pickle=False) as tables:
            return Moved({int(name, 16): tables[name].astype(np.uint64) for name in tables.files})
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} does not say where chunks are: {error}") from error
