"""Token buckets: what may be called at once, and how often in the long run."""

from hypothesis import given
from hypothesis import strategies as st

from forkypig.core.rate import Rates, TokenBucket


def test_a_burst_then_the_rate() -> None:
    bucket = TokenBucket(per_s=2.0, burst=3)
    assert [bucket.take(10.0) for _ in range(3)] == [0.0] * 3
    assert bucket.take(10.0) == 0.5
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0.0
    assert not bucket.is_full(11.5)
    assert bucket.is_full(12.0)


@given(st.floats(0.1, 1000), st.integers(1, 50), st.lists(st.floats(0, 0.5), max_size=200))
def test_never_more_than_the_burst_and_the_rate(per_s: float, burst: int, pauses_s: list[float]) -> None:
    bucket, now_s, taken = TokenBucket(per_s, burst), 0.0, 0
    for pause_s in pauses_s:
        now_s += pause_s
        taken += bucket.take(now_s) == 0.0
    assert taken <= burst + per_s * now_s + 1e-6


def test_waiting_as_told_suffices() -> None:
    bucket = TokenBucket(per_s=7.0, burst=1)
    assert bucket.take(0.0) == 0.0
    wait_s = bucket.take(0.01)
    assert bucket.take(0.01 + wait_s + 1e-9) == 0.0


def test_callers_do_not_share() -> None:
    rates = Rates(per_s=1.0, burst=1)
    assert rates.take("a", 0.0) == 0.0
    assert rates.take("a", 0.0) == 1.0
    assert rates.take("b", 0.0) == 0.0
    assert Rates(0.0, 5).take("a", 0.0) == 0.0
