"""How many machines a pool is to have, and who gets the next."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forkypig import errors
from forkypig.core.pools import (
    LEAST_LULL_S,
    LULL_S,
    MOST_LABELS,
    MOST_LULL_S,
    QUIET_S,
    REMEMBERED_S,
    Demand,
    Line,
    Stock,
    check_lease,
    check_sizes,
    missing,
    put_off_s,
    surplus,
    wanted,
)

few = st.integers(0, 12)


@example(ready=1, filling=0, acquired=0, waiting=0, owed=1, target=0, most=2, busiest=0)
@given(ready=few, filling=few, acquired=few, waiting=few, owed=few, target=few, most=st.integers(1, 30), busiest=few)
def test_a_pool_is_filled_up_to_what_is_wanted_and_never_beyond_its_maximum(
    ready: int, filling: int, acquired: int, waiting: int, owed: int, target: int, most: int, busiest: int
) -> None:
    stock = Stock(ready=ready, filling=filling, acquired=acquired, waiting=waiting, owed=owed)
    want = wanted(min(target, most), most, busiest)
    assert min(target, most) <= want <= most
    count = missing(stock, want, most)
    there = ready + filling + acquired
    assert there + count <= max(most, there)
    if there < most and not ready + filling and (waiting or want):
        assert count  # who waits, and a pool that is short, get something where there is room
    gone = surplus(stock, want, most, quiet=True)
    assert gone <= ready
    assert not (gone and count), "made with one hand, removed with the other"
    assert surplus(stock, want, most, quiet=False) <= gone


def test_what_is_removed_when_it_is_quiet_is_not_made_again() -> None:
    stock = Stock(ready=9)
    gone = surplus(stock, 3, 10, quiet=True)
    assert gone == 6
    assert missing(Stock(ready=9 - gone), 3, 10) == 0
    assert surplus(stock, 3, 10, quiet=False) == 0
    assert surplus(stock, 3, 5, quiet=False) == 4


def test_a_machine_that_is_recycled_is_had_once_more_than_was_there() -> None:
    assert missing(Stock(ready=3), 3, 10) == 0
    assert missing(Stock(ready=3, owed=1), 3, 10) == 1
    assert missing(Stock(ready=3, owed=1, filling=1), 3, 10) == 0
    assert missing(Stock(ready=3, owed=1, acquired=7), 3, 10) == 0


def test_refills_give_way_but_not_for_ever_and_not_to_those_who_wait_for_them() -> None:
    full, half, empty = (Stock(ready=count) for count in (4, 2, 0))
    assert put_off_s(full, 4, 0.0, 0.0) == LULL_S
    assert put_off_s(half, 4, 0.0, 0.0) == LULL_S / 2
    assert put_off_s(empty, 4, 0.0, 0.0) == LEAST_LULL_S
    assert put_off_s(empty, 0, 0.0, 0.0) == LEAST_LULL_S
    assert put_off_s(full, 4, LULL_S, LULL_S) == 0
    assert put_off_s(full, 4, 0.0, MOST_LULL_S - 0.1) == pytest.approx(0.1)
    assert put_off_s(half, 4, 0.0, MOST_LULL_S / 2) == 0
    for pressing in (Stock(ready=0, waiting=1), Stock(ready=4, owed=1)):
        assert put_off_s(pressing, 4, 0.0, 0.0) == 0


def test_demand_is_the_busiest_span_of_late() -> None:
    demand = Demand()
    assert demand.busiest(1.0, 0.0) == 0
    for at in (0.0, 10.0, 10.2, 10.9, 11.3, 30.0):
        demand.note(at)
    assert demand.busiest(1.0, 30.0) == 3
    assert demand.busiest(60.0, 30.0) == 6
    assert demand.busiest(1.0, 10.5 + REMEMBERED_S) == 2  # 10.9 and 11.3
    assert demand.busiest(1.0, 31.0 + REMEMBERED_S) == 0
    assert not demand.is_quiet(30.0 + QUIET_S - 1)
    assert demand.is_quiet(30.0 + QUIET_S)
    demand.stir(95.0)
    assert not demand.is_quiet(100.0)


def test_the_line_is_first_come_first_served_on_both_sides() -> None:
    line: Line[str, int] = Line()
    assert line.put("a") is None
    assert line.put("b") is None
    assert line.take() == "a"
    assert line.take() == "b"
    assert line.take() is None
    for waiter in (1, 2, 3):
        line.join(waiter)
    line.leave(2)
    line.leave(7)
    line.join(0, first=True)
    assert [line.put(machine) for machine in "cdef"] == [0, 1, 3, None]
    line.join(4)
    assert line.take() is None, "nobody passes who waits"
    line.keep({"x"})
    assert not line.ready


@given(st.lists(st.sampled_from(["put", "come", "leave"]), max_size=60))
def test_nobody_waits_while_a_machine_is_ready_and_all_are_served_in_turn(steps: list[str]) -> None:
    line: Line[int, int] = Line()
    machines = callers = 0
    served: list[int] = []
    for step in steps:
        if step == "put":
            machines += 1
            if (waiter := line.put(machines)) is not None:
                served.append(waiter)
        elif step == "come":
            callers += 1
            if line.take() is None:
                line.join(callers)
            else:
                served.append(callers)
        elif line.waiting:
            line.leave(line.waiting[0])
        assert not (line.ready and line.waiting)
    assert served == sorted(served)


def test_sizes_and_leases_that_can_not_be() -> None:
    check_sizes(0, 1)
    check_lease(600, 0, {"a": ""})
    for target, most in ((-1, 1), (2, 1), (0, 0), (0, 1001)):
        with pytest.raises(errors.InvalidRequest):
            check_sizes(target, most)
    nan = float("nan")
    for ttl, wait, labels in (
        (0.5, 0, {}),
        (nan, 0, {}),
        (60, nan, {}),
        (60, -1, {}),
        (60, 0, {"": "x"}),
        (60, 0, {"k" * 64: "x"}),
        (60, 0, {str(n): "" for n in range(MOST_LABELS + 1)}),
    ):
        with pytest.raises(errors.InvalidRequest):
            check_lease(ttl, wait, labels)
