"""The index: what numpy merges by regions is what a dictionary of pages would say."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.chunks.format import BASE, PAGE_BYTES, REGION_PAGES
from forkypig.pager.index import Mask, NotMade, PageIndex, Replaced, frozen_reference, merged

PAGES = 2 * REGION_PAGES + 37  # the last region is a part


class Own:
    """A layer's own pages; counts the questions."""

    def __init__(self, pages: set[int]) -> None:
        self.pages, self.questions = pages, 0

    def own_pages(self, first: int, count: int) -> Mask:
        self.questions += 1
        return np.array([page in self.pages for page in range(first, first + count)], np.bool_)


class Gone:
    def own_pages(self, first: int, count: int) -> Mask:
        raise OSError(errno.EIO, "gone")


page_sets = st.sets(st.integers(0, PAGES - 1), max_size=60)
look_ups = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 700)), max_size=12)


def chain_of(layers: list[set[int]]) -> tuple[list[PageIndex], list[list[int]]]:
    """Indexes of a chain with these own pages, and what each should say of every page."""
    indexes: list[PageIndex] = []
    expected: list[list[int]] = []
    below = [0] * PAGES
    for number, own in enumerate(layers, 1):
        indexes.append(PageIndex(PAGES * PAGE_BYTES, number, indexes[-1] if indexes else None, Own(own)))
        below = [frozen_reference(number) if page in own else owner for page, owner in enumerate(below)]
        expected.append(below)
    return indexes, expected


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(page_sets, min_size=1, max_size=5), look_ups)
def test_look_ups_in_any_order_say_what_a_flat_table_says(
    layers: list[set[int]], places: list[tuple[int, int]]
) -> None:
    indexes, expected = chain_of(layers)
    for place, (first, count) in enumerate(places):
        at = place % len(indexes)
        count = min(count, PAGES - first)
        assert indexes[at].references(first, count) == expected[at][first : first + count]


def complete(index: PageIndex, step: int = 3) -> None:
    for position in range(0, index.regions, step):
        index.complete_step(position, step)
    index.all_made()


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(page_sets, min_size=1, max_size=5), st.integers(1, 4))
def test_completing_gives_the_flat_table_and_what_it_names(layers: list[set[int]], step: int) -> None:
    indexes, expected = chain_of(layers)
    for number, (index, table) in enumerate(zip(indexes, expected, strict=True), 1):
        index.references(PAGES - 5, 5)  # some regions were needed before
        complete(index, step)
        assert np.concatenate(index.snapshot_of_regions()).tolist() == table
        assert {frozen_reference(layer) for layer in index.layers()} == set(table) - {0}
        assert index.own_page_count == table.count(frozen_reference(number))


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(page_sets, min_size=2, max_size=5), st.data())
def test_when_a_layer_is_packed_everyone_names_its_places_in_the_store(
    layers: list[set[int]], data: st.DataObject
) -> None:
    indexes, expected = chain_of(layers)
    made = data.draw(st.integers(1, len(layers)))
    for index in indexes[:made]:
        complete(index)
    which = data.draw(st.integers(0, made - 1))
    packed = np.array([(7 << 32 | page) if table else 0 for page, table in enumerate(expected[which])], np.uint64)
    done: Replaced = {}
    for _ in indexes[which].fill_packed(packed, done):
        pass
    for index in indexes[which + 1 :]:
        for _ in index.replaced(which + 1, packed, done):
            pass
    assert indexes[which].references(0, PAGES) == packed.tolist()
    assert which + 1 not in set().union(*(index.layers() for index in indexes))
    for index, table in zip(indexes[which + 1 :], expected[which + 1 :], strict=True):
        for page, (now, before) in enumerate(zip(index.references(0, PAGES), table, strict=True)):
            # A region that it shared with the packed one is packed whole.
            assert now == before or (now == packed[page] and before == expected[which][page])


def test_a_stored_index_is_filled_by_regions_and_dropped() -> None:
    index = PageIndex(PAGES * PAGE_BYTES, 0, None, None)
    with pytest.raises(NotMade):
        index.references(0, 1)
    index.fill(0, np.zeros(REGION_PAGES, np.uint64))
    assert index.references(0, REGION_PAGES) == [0] * REGION_PAGES
    index.fill(1, np.full(PAGES - REGION_PAGES, BASE, np.uint64))
    assert index.complete
    assert index.references(PAGES - 1, 1) == [BASE]
    child = PageIndex(PAGES * PAGE_BYTES, 3, index, Own({0, PAGES - 1}))
    assert child.references(0, 2) == [frozen_reference(3), 0]
    index.drop()
    with pytest.raises(NotMade) as missing:
        child.references(PAGES - 2, 2)
    assert (missing.value.index, missing.value.position) == (index, 2)


def test_a_region_without_own_pages_is_the_parents_array() -> None:
    below = np.ones(REGION_PAGES, np.uint64)
    assert merged(below, np.zeros(REGION_PAGES, np.bool_), 2) is below


def test_a_region_is_asked_for_once() -> None:
    own = Own({3})
    index = PageIndex(PAGES * PAGE_BYTES, 1, None, own)
    for _ in range(3):
        assert index.references(0, REGION_PAGES).count(frozen_reference(1)) == 1
    index.complete_step(0, 1)
    assert own.questions == 1


def test_a_chain_of_thousands_needs_no_stack() -> None:
    index = None
    for number in range(1, 5001):
        index = PageIndex(PAGE_BYTES * 8, number, index, Own({number % 8}))
    assert index is not None
    assert sorted(index.references(0, 8)) == [frozen_reference(number) for number in range(4993, 5001)]


def test_what_a_process_that_is_gone_does_not_say_is_an_error() -> None:
    with pytest.raises(OSError, match="gone"):
        PageIndex(PAGE_BYTES, 1, None, Gone()).references(0, 1)
