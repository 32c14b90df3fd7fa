"""Frozen layers: the pages that frozen processes hold, under the numbers by which indexes name them."""

import errno

from forkypig.pager.frozen import FrozenMemory


class Layer:
    """The pages of one snapshot, as long as they are in its frozen process."""

    __slots__ = ("memory", "number", "snapshot", "users")

    def __init__(self, number: int, snapshot: str, memory: FrozenMemory) -> None:
        self.number, self.snapshot = number, snapshot
        self.memory: FrozenMemory | None = memory  # None: lost
        self.users: set[str] = set()  # snapshots whose index names it, or may

    def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        if self.memory is None:
            raise OSError(errno.EIO, f"the frozen process of {self.snapshot} has ended")
        return self.memory.read(offset, length)

    def lose(self) -> None:
        """The process has ended, or the pages are elsewhere."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class FrozenLayers:
    """All frozen layers by number. Numbers are never used again."""

    def __init__(self) -> None:
        self._layers: dict[int, Layer] = {}
        self._last = 0

    def __getitem__(self, number: int) -> Layer:
        return self._layers[number]

    def add(self, snapshot: str, memory: FrozenMemory) -> Layer:
        """A layer for a snapshot."""
        self._last += 1
        layer = self._layers[self._last] = Layer(self._last, snapshot, memory)
        return layer

    def use(self, numbers: set[int], user: str) -> None:
        for number in numbers:
            self[number].users.add(user)

    def release(self, numbers: set[int], user: str) -> None:
        """The index of `user` does not name these layers any more: what nobody names goes."""
        for number in numbers:
            layer = self._layers.get(number)
            if layer is None:
                continue
            layer.users.discard(user)
            if not layer.users:
                layer.lose()
                del self._layers[number]
