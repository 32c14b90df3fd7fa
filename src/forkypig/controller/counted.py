"""How many are at something now."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

K = TypeVar("K")


@contextlib.contextmanager
def counted(counts: Counter[K], key: K) -> Iterator[None]:
    """One more in the block; what nobody is at is not in `counts`."""
    counts[key] += 1
    try:
        yield
    finally:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
