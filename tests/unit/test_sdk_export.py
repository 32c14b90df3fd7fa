"""A file that is written whole or not at all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.sdk.store import _write_whole


async def _pieces(*, fails: bool = False) -> AsyncIterator[bytes]:
    yield b"one"
    if fails:
        raise NotPossibleNow("it ended")
    yield b"two"


async def test_it_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")
    with pytest.raises(NotPossibleNow):
        await _write_whole(target, _pieces(fails=True))
    assert target.read_bytes() == b"before"
    assert await _write_whole(target, _pieces()) == 6
    assert target.read_bytes() == b"onetwo"
    assert list(tmp_path.iterdir()) == [target]


async def test_where_it_can_not_be_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no directory"):
        await _write_whole(tmp_path / "none" / "file", _pieces())
    with pytest.raises(InvalidRequest, match="is a directory"):
        await _write_whole(tmp_path, _pieces())
    assert list(tmp_path.iterdir()) == []
