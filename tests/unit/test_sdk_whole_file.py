"""A file that is written whole or not at all."""

import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, NotPossibleNow, ResourceExhausted
from forkypig.sdk.whole_file import write_whole


async def _pieces(*, fails: bool = False) -> AsyncIterator[bytes]:
    yield b"one"
    if fails:
        raise NotPossibleNow("it ended")
    yield b"two"


@pytest.fixture(params=["nameless", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also on a file system that knows no files without a name."""
    if request.param == "named":
        real = os.open

        def refuse(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no")
            return real(path, flags, *rest, dir_fd=dir_fd)

        monkeypatch.setattr("forkypig.sdk.whole_file.os.open", refuse)
    return str(request.param)


@pytest.mark.usefixtures("kind")
async def test_it_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for before in (None, b"before"):
        if before is not None:
            target.write_bytes(before)
        with pytest.raises(NotPossibleNow):
            await write_whole(target, _pieces(fails=True))
        assert (target.read_bytes() if target.exists() else None) == before
        assert await write_whole(target, _pieces()) == 6
        assert target.read_bytes() == b"onetwo"
        assert list(tmp_path.iterdir()) == [target]


async def test_who_is_killed_leaves_nothing(tmp_path: Path) -> None:
    seen = []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        seen.extend(tmp_path.iterdir())

    await write_whole(tmp_path / "file", pieces())
    assert seen == []


async def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "pipe"
    os.mkfifo(target)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(target.read_bytes()))
    reader.start()
    assert await write_whole(target, _pieces()) == 6
    reader.join()
    assert read == [b"onetwo"]
    assert target.is_fifo()


async def test_a_full_disk_is_told_as_what_it_is() -> None:
    with pytest.raises(ResourceExhausted, match=r"/dev/full.*its disk is full"):
        await write_whole(Path("/dev/full"), _pieces())
    assert Path("/dev/full").is_char_device()


async def test_where_it_can_not_be_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no directory"):
        await write_whole(tmp_path / "none" / "file", _pieces())
    with pytest.raises(InvalidRequest, match="is a directory"):
        await write_whole(tmp_path, _pieces())
    assert list(tmp_path.iterdir()) == []
