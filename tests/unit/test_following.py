"""Which events a follower is told: in order, none left out, none twice, whatever order transactions commit in."""

import random

from forkypig.core.following import GAP_US, is_wanted, told
from forkypig.model import Event


def event(sequence: int, time_us: int = 1_000_000_000) -> Event:
    return Event(sequence=sequence, time_us=time_us, kind="k", subject="s")


def numbers(events: object) -> list[int]:
    return [each.sequence for each in events]  # type: ignore[attr-defined]


def test_what_comes_after_a_young_gap_is_held_back() -> None:
    found = [event(4), event(5), event(7), event(8)]
    assert numbers(told(found, 3, now_us=1_000_000_000)) == [4, 5]
    assert numbers(told(found, 3, now_us=1_000_000_001 + GAP_US)) == [4, 5, 7, 8]  # nobody fills it any more
    assert numbers(told([event(4), event(5), event(6), *found[2:]], 3, now_us=1_000_000_000)) == [4, 5, 6, 7, 8]


def test_a_gap_at_the_beginning_counts_too() -> None:
    assert told([event(2)], 0, now_us=1_000_000_000) == []
    assert numbers(told([event(90_001)], 0, now_us=2_000_000_000)) == [90_001]  # older ones were removed


def test_transactions_that_commit_in_any_order_lose_nothing() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        waiting, committed, seen, after = list(range(1, 41)), list[int](), list[int](), 0
        while waiting or after < 40:
            if waiting:  # one of the next five commits
                committed.append(waiting.pop(chance.randrange(min(5, len(waiting)))))
            there = [event(number) for number in sorted(committed) if number > after]
            new = numbers(told(there, after, now_us=1_000_000_000))
            seen += new
            after = new[-1] if new else after
        assert seen == list(range(1, 41))


def test_kinds() -> None:
    assert is_wanted("machine.running", ())
    assert is_wanted("machine.running", ("fork", "machine"))
    assert is_wanted("machine.running", ("machine.running",))
    assert not is_wanted("machines.running", ("machine",))
