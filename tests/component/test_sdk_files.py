"""Files into and out of machines, from honest and from hostile ones."""

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig import Forky, Machine, errors
from tests.component.fake_controller import Instance


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    made = Instance(tmp_path / "h")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def web(instance: Instance) -> AsyncIterator[Machine]:
    async with Forky(instance.home) as forky:
        yield await forky.run(name="web")


def archive(*entries: tuple[str, bytes | str, bytes]) -> bytes:
    """A tar of (name, kind, content or link target)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind if isinstance(kind, bytes) else kind.encode()
            entry.mode = 0o7777
            if entry.isreg():
                entry.size = len(content)
            else:
                entry.linkname = content.decode()
            tar.addfile(entry, io.BytesIO(content) if entry.isreg() else None)
    return made.getvalue()


FILE, DIRECTORY, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


async def test_a_tree_there_and_back(web: Machine, instance: Instance, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(3_000_001))
    (source / "deep/er/script").write_text("#!/bin/sh\n")
    (source / "deep/er/script").chmod(0o755)
    (source / "empty").mkdir()
    (source / "link").symlink_to("deep/er/script")
    seen: list[tuple[int, int]] = []
    copied = await web.upload(source, "/tmp", on_bytes=lambda done, total: seen.append((done, total)))
    assert (copied.files, copied.bytes) == (2, 3_000_011)
    assert seen[-1] == (3_000_011, 3_000_011)
    back = await web.download("/tmp/source", tmp_path / "back")
    assert (back.files, back.bytes, back.left_out) == (2, 3_000_011, ())
    assert (tmp_path / "back/big").read_bytes() == (source / "big").read_bytes()
    assert (tmp_path / "back/deep/er/script").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "back/link").readlink() == Path("deep/er/script")
    assert (tmp_path / "back/empty").is_dir()


async def test_into_a_directory_or_as_a_name(web: Machine, instance: Instance, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    await web.upload(tmp_path / "a", "/root")
    await web.upload(tmp_path / "a", "/root/b")
    assert sorted(path.name for path in (instance.root / "root").iterdir()) == ["a", "b"]
    (tmp_path / "into").mkdir()
    await web.download("/root/b", tmp_path / "into")
    await web.download("/root/b", tmp_path / "renamed")
    assert (tmp_path / "into/b").read_text() == (tmp_path / "renamed").read_text() == "hello"


async def test_one_file_as_bytes(web: Machine, instance: Instance) -> None:
    await web.write_file("/root/data", b"\x00\xff" * 300_000, mode=0o600)
    assert await web.read_file("/root/data") == b"\x00\xff" * 300_000
    assert (instance.root / "root/data").stat().st_mode & 0o777 == 0o600
    with pytest.raises(errors.InvalidRequest, match="not a file"):
        await web.read_file("/root")


async def test_what_is_missing_is_named(web: Machine, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    for verb, source, target, words in (
        (web.upload, tmp_path / "no", "/root", "no file «.*no»"),
        (web.upload, tmp_path / "a", "/no/where", "no directory «/no»"),
        (web.upload, tmp_path / "a", "/no/", "no directory «.*:/no»"),
        (web.download, "/no", tmp_path, "no file «.*:/no»"),
        (web.download, "/root", tmp_path / "no/where", "no directory «.*no»"),
    ):
        with pytest.raises(errors.NotFound, match=words):
            await verb(source, target)
    for verb, source, target in (
        (web.upload, tmp_path / "a", "root/a"),
        (web.download, "root/a", tmp_path),
        (web.download, "/", tmp_path),
    ):
        with pytest.raises(errors.InvalidRequest):
            await verb(source, target)
    with pytest.raises(errors.NotFound, match="no file «/no»"):
        await web.read_file("/no")


@pytest.mark.parametrize(
    "entries",
    [
        [("../evil", FILE, b"x")],
        [("/evil", FILE, b"x")],
        [("top/../../evil", FILE, b"x")],
        [("top", DIRECTORY, b""), ("evil", FILE, b"x")],
        [("top", DIRECTORY, b""), ("top/hard", HARD, b"../secret")],
        [("top", DIRECTORY, b""), ("top/hard", HARD, b"/secret")],
        # Through a link that is left out, and through one that is made.
        [("top", DIRECTORY, b""), ("top/d", DIRECTORY, b""), ("top/in", LINK, b"d"), ("top/in/evil", FILE, b"x")],
    ],
)
async def test_names_that_lead_out_end_the_copy(
    web: Machine, instance: Instance, tmp_path: Path, entries: list[tuple[str, bytes, bytes]]
) -> None:
    (tmp_path / "secret").write_text("secret")
    instance.agent.archives["/top"] = archive(*entries)
    (tmp_path / "into").mkdir()
    with pytest.raises(errors.InvalidRequest, match="refused"):
        await web.download("/top", tmp_path / "into")
    assert not list(tmp_path.rglob("evil"))
    assert not list((tmp_path / "into").rglob("hard"))


@pytest.mark.parametrize("where", ["/etc", "../..", "..", "d/../..", "d/../../../etc", "d/../d"])
async def test_links_that_lead_out_are_left_out(web: Machine, instance: Instance, tmp_path: Path, where: str) -> None:
    instance.agent.archives["/top"] = archive(
        ("top", DIRECTORY, b""),
        ("top/d", DIRECTORY, b""),
        ("top/out", LINK, where.encode()),
        ("top/file", FILE, b"kept"),
    )
    copied = await web.download("/top", tmp_path / "into")
    assert copied.left_out == (f"top/out: a link to {where}, which is not part of the copy",)
    assert not (tmp_path / "into/out").is_symlink()
    assert (tmp_path / "into/file").read_bytes() == b"kept"


async def test_writing_through_a_link_that_was_left_out(web: Machine, instance: Instance, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    instance.agent.archives["/top"] = archive(
        ("top", DIRECTORY, b""), ("top/out", LINK, str(outside).encode()), ("top/out/evil", FILE, b"x")
    )
    with pytest.raises(errors.NotPossibleNow, match="No such file"):
        await web.download("/top", tmp_path / "into")
    assert not list(outside.iterdir())


async def test_links_that_were_there_are_not_followed(web: Machine, instance: Instance, tmp_path: Path) -> None:
    outside, into = tmp_path / "outside", tmp_path / "into"
    outside.mkdir()
    into.mkdir()
    (outside / "file").write_text("old")
    instance.agent.archives["/top"] = archive(("top", DIRECTORY, b""), ("top/file", FILE, b"new"))
    (into / "top").mkdir()
    (into / "top/file").symlink_to(outside / "file")
    await web.download("/top", into)
    assert (into / "top/file").read_bytes() == b"new"
    assert (outside / "file").read_text() == "old"


async def test_modes_are_tamed_and_devices_left_out(web: Machine, instance: Instance, tmp_path: Path) -> None:
    instance.agent.archives["/top"] = archive(
        ("top", DIRECTORY, b""),
        ("top/suid", FILE, b"x"),
        ("top/dev", tarfile.CHRTYPE, b""),
        ("top/p", tarfile.FIFOTYPE, b""),
    )
    copied = await web.download("/top", tmp_path / "into")
    assert len(copied.left_out) == 2
    assert (tmp_path / "into/suid").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "into").stat().st_mode & 0o7777 == 0o755
    assert sorted(os.listdir(tmp_path / "into")) == ["suid"]


async def test_archives_that_are_none(web: Machine, instance: Instance, tmp_path: Path) -> None:
    whole = archive(("top", FILE, b"x" * 100_000))
    for data in (b"", b"rubbish" * 1000, whole[:50_000]):
        instance.agent.archives["/top"] = data
        with pytest.raises(errors.InternalError, match=r"broke off|empty"):
            await web.download("/top", tmp_path / "got")


async def test_a_file_name_of_gigabytes_is_refused(web: Machine, instance: Instance, tmp_path: Path) -> None:
    entry = tarfile.TarInfo("top")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    instance.agent.archives["/top"] = entry.tobuf(tarfile.GNU_FORMAT) + bytes(20_000)
    with pytest.raises(errors.InvalidRequest, match="file name of"):
        await web.download("/top", tmp_path / "got")


async def test_a_copy_that_is_cancelled_leaves_no_thread(web: Machine, instance: Instance, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/big").write_bytes(bytes(200_000_000))
    task = asyncio.create_task(web.upload(tmp_path / "pipe", "/root"))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)
    assert await web.exec(["true"])  # the channel is as good as before


async def test_a_copy_that_breaks_off_leaves_what_was_there(web: Machine, instance: Instance, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (into / "got").write_bytes(b"old")
    instance.agent.archives["/top"] = archive(("top", FILE, bytes(500_000)))[:300_000]
    instance.agent.archives["/tree"] = archive(("tree", DIRECTORY, b""), ("tree/a", FILE, bytes(500_000)))[:300_000]
    for source, target in (("/top", "got"), ("/top", "new"), ("/tree", "tree")):
        with pytest.raises(errors.InternalError, match="broke off"):
            await web.download(source, into / target)
    assert (into / "got").read_bytes() == b"old"
    assert {path.name for path in into.rglob("*")} == {"got", "tree"}


async def test_onto_what_is_there(web: Machine, instance: Instance, taken: tuple[Path, int]) -> None:
    """As cp: through links, into pipes, into a file that has two names; else the file is replaced."""
    into, pipe = taken
    instance.agent.archives["/top"] = archive(("top", FILE, b"newer"))
    for name in ("file", "link", "two", "pipe", "new"):
        assert (await web.download("/top", into / name)).bytes == 5
    assert os.read(pipe, 9) == b"newer"
    for name in ("file", "linked", "names", "new"):
        assert (into / name).read_bytes() == b"newer"
        assert (into / name).stat().st_mode & 0o777 == 0o755
    assert {path.name for path in into.iterdir()} == {"file", "linked", "two", "link", "names", "pipe", "new"}
