"""The index: what numpy merges by regions is what a dictionary of pages would say."""

import errno
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.pager.index import NO_OWNER, PAGE_BYTES, REGION_PAGES, Mask, PageIndex, merged, runs_of

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
    below = [NO_OWNER] * PAGES
    for number, own in enumerate(layers, 1):
        indexes.append(PageIndex(PAGES * PAGE_BYTES, number, indexes[-1] if indexes else None, Own(own)))
        below = [number if page in own else owner for page, owner in enumerate(below)]
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
        assert indexes[at].owners(first, count) == expected[at][first : first + count]


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(page_sets, min_size=1, max_size=5), st.integers(1, 4))
def test_completing_gives_the_flat_table_and_what_it_names(layers: list[set[int]], step: int) -> None:
    indexes, expected = chain_of(layers)
    for number, (index, table) in enumerate(zip(indexes, expected, strict=True), 1):
        index.owners(PAGES - 5, 5)  # some regions were needed before
        for position in range(0, index.regions, step):
            index.complete_step(position, step)
        index.all_made()
        assert index.as_array().tolist() == table
        assert index.named() == set(table) - {NO_OWNER}
        assert index.own_page_count == table.count(number)
        runs = [run for position in range(index.regions) for run in index.own_runs(position).tolist()]
        assert [page for first, count in runs for page in range(first, first + count)] == sorted(layers[number - 1])


@settings(deadline=None)  # time on a busy host says nothing
@given(page_sets, page_sets)
def test_an_index_from_owners_shares_what_its_parent_has(below: set[int], own: set[int]) -> None:
    _, expected = chain_of([below, own])
    parent = PageIndex.from_owners(np.array(expected[0], np.uint16), 1, None)
    index = PageIndex.from_owners(np.array(expected[1], np.uint16), 2, parent)
    assert index.complete
    assert index.owners(0, PAGES) == expected[1]
    for position in range(index.regions):
        first = position * REGION_PAGES
        if not own.intersection(range(first, first + REGION_PAGES)) and any(below):
            assert index._regions[position] is parent._regions[position] or not index._regions[position].any()  # type: ignore[union-attr]


def test_a_region_without_own_pages_is_the_parents_array() -> None:
    below = np.ones(REGION_PAGES, np.uint16)
    assert merged(below, np.zeros(REGION_PAGES, np.bool_), 2) is below


def test_a_region_is_asked_for_once() -> None:
    own = Own({3})
    index = PageIndex(PAGES * PAGE_BYTES, 1, None, own)
    for _ in range(3):
        assert index.owners(0, REGION_PAGES).count(1) == 1
    index.complete_step(0, 1)
    assert own.questions == 1


def test_a_chain_of_thousands_needs_no_stack() -> None:
    index = None
    for number in range(1, 5001):
        index = PageIndex(PAGE_BYTES * 8, number, index, Own({number % 8}))
    assert index is not None
    assert sorted(index.owners(0, 8)) == list(range(4993, 5001))


def test_what_a_process_that_is_gone_does_not_say_is_an_error() -> None:
    with pytest.raises(OSError, match="gone"):
        PageIndex(PAGE_BYTES, 1, None, Gone()).owners(0, 1)


@settings(deadline=None)  # time on a busy host says nothing
@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_runs_cover_exactly_what_is_set(mask: list[bool]) -> None:
    runs = runs_of(np.array(mask, np.bool_)).tolist()
    assert [at for first, count in runs for at in range(first, first + count)] == [
        at for at, on in enumerate(mask) if on
    ]
    assert all(a + b < c for (a, b), (c, _) in pairwise(runs))
