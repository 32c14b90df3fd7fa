"""Spans of time as people write them."""

import pytest

from forkypig.cli.durations import seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("30d", 2_592_000), ("12h", 43_200), ("10m", 600), ("10min", 600), ("1.5s", 1.5), ("200ms", 0.2), ("7", 7)],
)
def test_spans(text: str, wanted: float) -> None:
    assert seconds(text) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "d", "-1s", "1y", "1 day", "1e9s", "٣d", "9" * 20])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="30d, 12h"):
        seconds(text)
