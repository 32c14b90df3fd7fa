"""Bisection over made-up histories, and what of a history is between two snapshots."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.core.bisection import Bisection, Verdict, between, verdict_of
from forkypig.core.genealogy import history
from forkypig.errors import InvalidRequest
from forkypig.model import ImageId, Shape, Snapshot, SnapshotId, SnapshotKind


def _snapshot(name: str, parent: str | None = None) -> Snapshot:
    return Snapshot(
        id=SnapshotId(name),
        kind=SnapshotKind.KEPT,
        parent=SnapshotId(parent) if parent else None,
        image=ImageId("i-0123456789ab"),
        shape=Shape(),
        machine_type="",
        qemu_build="",
        accelerator="",
        cpu_model="",
    )


def _chain(count: int) -> list[Snapshot]:
    """Oldest first: s0, s1, …"""
    return [_snapshot(f"s{n}", f"s{n - 1}" if n else None) for n in range(count)]


@given(st.data())
def test_it_finds_the_first_bad_one_in_few_tries(data: st.DataObject) -> None:
    chain = _chain(data.draw(st.integers(2, 60)))
    first_bad = data.draw(st.integers(1, len(chain) - 1))
    search = Bisection(between(chain[::-1], chain[0], chain[-1]))
    tries = 0
    while (snapshot := search.next()) is not None:
        tries += 1
        search.tell(snapshot, Verdict.BAD if int(snapshot.id[1:]) >= first_bad else Verdict.GOOD)
    assert search.suspects == [chain[first_bad]]
    assert tries <= (len(chain) - 1).bit_length()


@given(st.data())
def test_skipped_ones_hide_at_most_themselves(data: st.DataObject) -> None:
    chain = _chain(data.draw(st.integers(2, 30)))
    first_bad = data.draw(st.integers(1, len(chain) - 1))
    skipped = data.draw(st.sets(st.integers(1, len(chain) - 2))) if len(chain) > 2 else set()
    search = Bisection(between(chain[::-1], chain[0], chain[-1]))
    tried: set[str] = set()
    while (snapshot := search.next()) is not None:
        assert snapshot.id not in tried, "a snapshot was tried twice"
        tried.add(snapshot.id)
        at = int(snapshot.id[1:])
        found = Verdict.SKIP if at in skipped else Verdict.BAD if at >= first_bad else Verdict.GOOD
        search.tell(snapshot, found)
    suspects = [int(each.id[1:]) for each in search.suspects]
    assert first_bad in suspects
    assert set(suspects[:-1]) <= skipped


def test_exit_codes_mean_what_git_bisect_says() -> None:
    assert [verdict_of(code) for code in (0, 1, 124, 125, 126, 255)] == [
        Verdict.GOOD,
        Verdict.BAD,
        Verdict.BAD,
        Verdict.SKIP,
        Verdict.BAD,
        Verdict.BAD,
    ]


def test_good_has_to_be_before_bad_and_both_in_the_history() -> None:
    chain = _chain(4)
    newest_first = chain[::-1]
    assert between(newest_first, chain[1], chain[3]) == chain[2:]
    with pytest.raises(InvalidRequest, match="no ancestor"):
        between(newest_first, chain[3], chain[1])
    with pytest.raises(InvalidRequest, match="good and bad"):
        between(newest_first, chain[1], chain[1])
    with pytest.raises(InvalidRequest, match="not in this history"):
        between(newest_first, chain[1], _snapshot("other"))


def test_a_history_ends_where_its_records_do_and_in_a_circle() -> None:
    chain = _chain(3)
    assert history(SnapshotId("s2"), chain) == chain[::-1]
    assert history(SnapshotId("s2"), chain[1:]) == [chain[2], chain[1]]
    assert history(None, chain) == []
    assert len(history(SnapshotId("a"), [_snapshot("a", "b"), _snapshot("b", "a")])) == 2
