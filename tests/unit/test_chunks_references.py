"""References: which of four kinds each is, and what it says."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forkypig.chunks.format import (
    BASE,
    MAX_PACK,
    ZERO,
    frozen,
    is_base,
    is_frozen,
    is_packed,
    layers_of,
    pack_number,
    pack_path,
    packs_of,
    positions_of,
    reference,
)

PACKS = st.integers(1, MAX_PACK)
POSITIONS = st.integers(0, 2**32 - 1)
LAYERS = st.integers(1, 2**32)


@given(PACKS, POSITIONS, LAYERS)
def test_each_reference_is_of_one_kind(pack: int, position: int, layer: int) -> None:
    references = np.array([ZERO, reference(pack, position), BASE, frozen(layer)], np.uint64)
    kinds = np.stack([references == ZERO, is_packed(references), is_base(references), is_frozen(references)])
    assert np.array_equal(kinds, np.eye(4, dtype=bool))
    assert packs_of(references[1:2]).tolist() == [pack]
    assert positions_of(references[1:2]).tolist() == [position]
    assert layers_of(references[3:]).tolist() == [layer]


@given(PACKS)
def test_names_of_packs(number: int) -> None:
    assert pack_number(pack_path(Path("/x"), number).name) == number


def test_names_that_are_not_of_packs() -> None:
    names = ("0000000000000001.pack.part", "0000000000000000.pack", "ffffffffffffffff.pack", "1.pack", "lock")
    assert [pack_number(name) for name in names] == [None] * 5
