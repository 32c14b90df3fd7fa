"""Takes verified chunks that come from elsewhere into the store, some MiB at a time.

Each batch is committed by itself: the store is not locked while we wait for the next, and what has come stays when the
rest does not, so that another try need not fetch it again. Until a manifest names them they are kept by pins alone.
"""

import numpy as np

from forkypig.archive.pins import Pins
from forkypig.chunks import faults
from forkypig.chunks.format import as_hashes
from forkypig.chunks.store import Store

BATCH_BYTES = 32 << 20


class Intake:
    """One transfer's."""

    def __init__(self, store: Store, pins: Pins) -> None:
        self._store, self._pins = store, pins
        self._waiting: dict[bytes, tuple[bytes, int]] = {}
        self._bytes = 0
        self.new_chunks = 0
        self.new_bytes = 0

    def add(self, address: bytes, piece: bytes, size: int) -> None:
        """A chunk: as it is stored but for the encryption, verified; its length and RAW. Raises ResourceExhausted."""
        if address not in self._waiting:
            self._waiting[address] = (piece, size)
            self._bytes += len(piece)
            if self._bytes >= BATCH_BYTES:
                self.flush()

    def flush(self) -> None:
        """All that was added is in the store. Raises ResourceExhausted; what was flushed before stays."""
        if not self._waiting:
            return
        hashes = as_hashes(list(self._waiting))
        each = list(self._waiting.values())
        self._pins.add(hashes)
        with self._store.writer() as writer:
            fresh = np.flatnonzero(self._store.find(hashes) == 0)
            if len(fresh):
                pieces = [each[n][0] for n in fresh]
                writer.add_stored(hashes[fresh], pieces, np.array([each[n][1] for n in fresh], np.uint32))
                writer.commit()
                self.new_chunks += len(fresh)
                self.new_bytes += sum(map(len, pieces))
        faults.reach("intake")
        self._waiting.clear()
        self._bytes = 0
