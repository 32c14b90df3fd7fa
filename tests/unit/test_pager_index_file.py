"""The index on disk: it comes back as it was, and anything else is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.pager import index_file
from forkypig.pager.index import PAGE_BYTES
from forkypig.pager.index_file import Damaged, SavedIndex


def saved(owners: list[int]) -> SavedIndex:
    return SavedIndex(
        snapshot="s-0123456789ab",
        parent="s-ba9876543210",
        size_bytes=len(owners) * PAGE_BYTES,
        layers=("s-ba9876543210", "s-0123456789ab"),
        owners=np.array(owners, np.uint16),
        touched=((7, 8), (1, 2)),
    )


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(st.integers(0, 2), min_size=1, max_size=50))
def test_there_and_back(owners: list[int]) -> None:
    index = saved(owners)
    back = index_file.decode(index_file.encode(index))
    assert back.owners.tolist() == owners
    assert (back.snapshot, back.parent, back.size_bytes, back.layers, back.touched) == (
        index.snapshot,
        index.parent,
        index.size_bytes,
        index.layers,
        index.touched,
    )


@settings(deadline=None)  # time on a busy host says nothing
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(position: int, difference: int) -> None:
    data = bytearray(index_file.encode(saved([0, 1, 2, 1])))
    data[position % len(data)] ^= difference
    with pytest.raises(Damaged):
        index_file.decode(bytes(data))


@settings(deadline=None)  # time on a busy host says nothing
@given(st.integers(0, 200))
def test_a_file_cut_short_is_noticed(length: int) -> None:
    data = index_file.encode(saved([0, 1, 2, 1]))
    with pytest.raises(Damaged):
        index_file.decode(data[: min(length, len(data) - 1)])


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(st.sampled_from([0, 3, 9, 40_000]), min_size=1, max_size=50))
def test_renumbering_keeps_who_is_whose(owners: list[int]) -> None:
    numbers = {3: 1, 9: 2, 40_000: 3}
    there = index_file.renumbered(np.array(owners, np.uint16), numbers)
    back = index_file.renumbered(there, {new: old for old, new in numbers.items()})
    assert back.tolist() == owners
