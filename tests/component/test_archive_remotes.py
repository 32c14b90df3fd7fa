"""Pushing to and pulling from a directory and an S3: only what is missing goes over, interrupted or not."""

import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from forkypig.archive import intake, pulling, pushing
from forkypig.archive.importing import Arrived
from forkypig.archive.pins import pinned, pinning
from forkypig.archive.pushing import Pushed
from forkypig.archive.remote import Remote
from forkypig.chunks.check import check
from forkypig.chunks.collect import collect
from forkypig.chunks.crypt import Key
from forkypig.chunks.store import Store
from forkypig.errors import (
    Damaged,
    ForkyError,
    HostUnreachable,
    InvalidRequest,
    NotFound,
    NotPossibleNow,
    ResourceExhausted,
)
from forkypig.images.store import ImageStore
from tests import victims
from tests.archive_rig import (
    ABOUT,
    Home,
    add_image,
    assert_same,
    export,
    import_,
    memory_of,
    new_home,
    packs_bytes,
    quiet,
    save,
)
from tests.chunks_rig import snapshot_id

Environment = dict[str, str]
Place = tuple[str, Environment]
Work = Callable[..., object]

BATCH_BYTES = 300_000


@pytest.fixture(scope="module")
def s3() -> Iterator[Environment]:
    """A server that speaks S3."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_UNRELATED": "x",
    }
    bucket = urllib.request.Request(f"http://{host}:{port}/pigs", method="PUT")
    urllib.request.urlopen(bucket, timeout=10).close()
    try:
        yield environment
    finally:
        server.stop()


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return (tmp_path / "a remote").as_uri(), {}
    return f"s3://pigs/{tmp_path.name}/deep", request.getfixturevalue("s3")


def push(home: Home, place: Place, number: int, tag: str = "") -> Pushed:
    remote = Remote.open(*place, make=True)
    about, cache = replace(ABOUT, tag=tag, created_us=number), home.directory / "cache"
    with pinning(home.store) as pins:
        return pushing.push(home.store, home.images, pins, remote, snapshot_id(number), about, cache, quiet())


def pull(home: Home, place: Place, name: str, known: tuple[str, ...] = ()) -> Arrived:
    remote, cache = Remote.open(*place), home.directory / "cache"
    with pinning(home.store) as pins:
        return pulling.pull(home.store, home.images, pins, remote, name, known=known, cache=cache, meter=quiet())


def test_there_and_back(here: Home, there: Home, place: Place) -> None:
    memory = memory_of(1)
    changed = memory.copy()
    changed[: 20 * 4096] = 77
    save(here, 1, memory)
    save(here, 2, changed)
    with pytest.raises(NotFound, match="nothing was pushed there yet"):
        Remote.open(*place)
    first = push(here, place, 1, "good")
    assert not first.was_there and first.new_chunks > 600
    second = push(here, place, 2)
    assert 0 < second.new_chunks < 30 and second.sent_bytes < first.sent_bytes / 20
    again = push(here, place, 2, "better")  # the tag is what is new
    assert again.was_there and again.sent_bytes == 0
    heads = pulling.heads(Remote.open(*place))
    assert [(head.snapshot, head.about.tag) for head in heads] == [(snapshot_id(1), "good"), (snapshot_id(2), "")]

    pulled = pull(there, place, "good")
    assert pulled.manifest is not None and pulled.head.about.message == ABOUT.message
    assert_same(there, 1, memory)
    before = packs_bytes(there)
    assert 0 < pull(there, place, "better").new_chunks < 30
    assert packs_bytes(there) - before < before / 20
    assert_same(there, 2, changed)
    assert check(there.store).problems == ()
    assert pull(there, place, snapshot_id(2), known=(snapshot_id(2),)).manifest is None
    with pytest.raises(NotFound, match="lists what is there"):
        pull(there, place, "none")
    # From the other side, into a third that has nothing: everything had to be where it can be found.
    assert push(there, place, 2).was_there


def test_an_encrypted_store_stays_encrypted(tmp_path: Path) -> None:
    key = Key(b"k" * 32)
    here, there, place = new_home(tmp_path / "here", key), new_home(tmp_path / "there", key), tmp_path / "remote"
    add_image(here)
    memory = memory_of(1)
    save(here, 1, memory)
    push(here, (place.as_uri(), {}), 1)
    pull(there, (place.as_uri(), {}), snapshot_id(1))
    assert_same(there, 1, memory)
    with pytest.raises(InvalidRequest, match="FORKY_STORE_KEY"):
        pull(new_home(tmp_path / "other"), (place.as_uri(), {}), snapshot_id(1))


def test_a_name_that_is_taken_there(here: Home, tmp_path: Path) -> None:
    place = ((tmp_path / "remote").as_uri(), {})
    save(here, 1, memory_of(1))
    save(here, 2, memory_of(2))
    push(here, place, 1, "good")
    with pytest.raises(NotPossibleNow, match=snapshot_id(1)):
        push(here, place, 2, "good")
    other = new_home(tmp_path / "other")
    add_image(other)
    save(other, 1, memory_of(3))
    with pytest.raises(NotPossibleNow, match="another snapshot with the id"):
        push(other, place, 1)


PUSH_STEPS = ["push-pack", "push-index", "push-image", "push-manifest", "push-head"]
PULL_STEPS = ["image-written", "pull-run", "intake", "complete", "manifest-written", "manifest-renamed"]


def travel(batch_bytes: int, work: Work, directory: Path, *arguments: Any) -> None:
    """Pushes or pulls."""
    pushing.PACK_BYTES = intake.BATCH_BYTES = batch_bytes
    work(Home(directory, Store.open(directory / "store"), ImageStore(directory / "images")), *arguments)


def killed_at(step: str, nth: int, work: Work, home: Home, *arguments: Any) -> bool:
    return victims.killed_at(step, travel, BATCH_BYTES, work, home.directory, *arguments, nth=nth)


@pytest.mark.parametrize("step", PUSH_STEPS)
def test_a_push_that_is_killed_goes_on_where_it_was(
    here: Home, there: Home, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "PACK_BYTES", BATCH_BYTES)
    place = ((tmp_path / "remote").as_uri(), {})
    memory = memory_of(1)
    save(here, 2, memory_of(2))
    push(here, place, 2)
    whole = push_size(tmp_path, here, memory)
    assert killed_at(step, 3 if step in PUSH_STEPS[:2] else 1, push, here, place, 1, "good") != (
        step == "push-image"  # which is there already, from the first push
    )
    pull(there, place, snapshot_id(2))  # what was there stays as it was
    assert_same(there, 2, memory_of(2))
    done = push(here, place, 1, "good")
    if step in PUSH_STEPS[:2]:
        assert done.sent_bytes < whole - 2 * 250_000  # what is there by then is not sent again
    else:
        assert done.sent_bytes == 0
    pull(there, place, "good")
    assert_same(there, 1, memory)


def push_size(tmp_path: Path, here: Home, memory: object) -> int:
    """Saves snapshot 1, and says what a whole push of it sends."""
    save(here, 1, memory)  # type: ignore[arg-type]
    elsewhere = ((tmp_path / "elsewhere").as_uri(), {})
    push(here, elsewhere, 2)
    return push(here, elsewhere, 1).sent_bytes


@pytest.mark.parametrize("step", PULL_STEPS)
def test_a_pull_that_is_killed_leaves_the_snapshot_whole_or_not_at_all(
    here: Home, there: Home, tmp_path: Path, step: str
) -> None:
    place = ((tmp_path / "remote").as_uri(), {})
    memory = memory_of(1)
    save(here, 1, memory)
    push(here, place, 1)
    assert killed_at(step, 3 if step == "intake" else 1, pull, there, place, snapshot_id(1))
    there = replace(there, store=Store.open(there.store.directory))
    is_there = there.snapshots() == [snapshot_id(1)]
    assert is_there == (step == "manifest-renamed")
    if step == "intake":  # what came stays until it is collected
        assert 0 < pull(there, place, snapshot_id(1)).new_bytes < 0.9 * packs_bytes(here)
    else:
        collect(there.store, pinned(there.store))
        assert is_there or packs_bytes(there) == 0
        assert not list((there.store.directory / "transfers").iterdir())
        pull(there, place, snapshot_id(1), known=(snapshot_id(1),) if is_there else ())
    assert_same(there, 1, memory)


def test_two_pushers_at_once_lose_nothing(here: Home, there: Home, tmp_path: Path) -> None:
    place = ((tmp_path / "remote").as_uri(), {})
    save(here, 1, memory_of(1))
    save(here, 2, memory_of(1))
    pushers = [
        victims.start(travel, BATCH_BYTES, push, here.directory, place, number, f"tag-{number}") for number in (1, 2, 1)
    ]
    assert [victims.exit_code(pusher) for pusher in pushers] == [0, 0, 0]
    for number in (1, 2):
        pull(there, place, f"tag-{number}")
        assert_same(there, number, memory_of(1))


def test_damage_there_is_found(here: Home, tmp_path: Path) -> None:
    directory = tmp_path / "remote"
    place = (directory.as_uri(), {})
    save(here, 1, memory_of(1))
    push(here, place, 1)
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"", _flipped(content), None):
            path.unlink(missing_ok=True) if damaged is None else path.write_bytes(damaged)
            there = new_home(tmp_path / "there" / f"{path.name}-{len(damaged or b'-')}")
            with pytest.raises(ForkyError) as caught:
                pull(there, place, snapshot_id(1))
            assert isinstance(caught.value, Damaged | NotFound | InvalidRequest), caught.value
            assert there.snapshots() == []
        path.write_bytes(content)


def _flipped(content: bytes) -> bytes:
    """All its bytes, so that what is read over is among them."""
    return bytes(byte ^ 1 for byte in content)


@pytest.mark.parametrize(
    "url",
    ["file:relative", "file://host/x", "http://example.org/x", "s3://", "/tmp/x", "", "s3://b/p?x=1", "gs://bucket/x"],
)
def test_places_that_are_none(url: str) -> None:
    with pytest.raises(InvalidRequest, match="file:///DIRECTORY"):
        Remote.open(url, {}, make=True)


def test_an_object_store_that_is_not_there_or_refuses(s3: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="AWS_ACCESS_KEY_ID"):
        Remote.open("s3://pigs/x", {})
    monkeypatch.setattr("forkypig.archive.remote._RETRY", {"max_retries": 0})
    with pytest.raises(InvalidRequest, match="there is no bucket for s3://none/x"):
        Remote.open("s3://none/x", s3, make=True).list("indexes", ".index")
    with pytest.raises(HostUnreachable, match="s3://pigs/x"):
        Remote.open("s3://pigs/x", s3 | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})


def test_a_directory_with_other_things_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "forkypig.json").write_text('{"format": 9}')
    with pytest.raises(InvalidRequest, match="use a newer one"):
        Remote.open(tmp_path.as_uri(), {})
    (tmp_path / "forkypig.json").write_text("[]")
    with pytest.raises(Damaged):
        Remote.open(tmp_path.as_uri(), {}, make=True)


@pytest.fixture
def little(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, which holds no snapshot."""
    directory = tmp_path / "little"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "forky-test", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def left_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file() and path.suffix in (".part", ".pin")]


def test_a_full_disk_there_and_here(here: Home, little: Path, tmp_path: Path) -> None:
    save(here, 1, memory_of(1))
    place = ((little / "remote").as_uri(), {})
    with pytest.raises(ResourceExhausted, match="no room for"):
        push(here, place, 1)
    assert pulling.heads(Remote.open(*place)) == []
    assert not [path for path in little.rglob("*.pack*") if path.is_file()]
    shutil.rmtree(little / "remote")

    elsewhere = ((tmp_path / "remote").as_uri(), {})
    push(here, elsewhere, 1)
    there = new_home(little / "home")
    with pytest.raises(ResourceExhausted):
        pull(there, elsewhere, snapshot_id(1))
    with pytest.raises(ResourceExhausted):
        import_(there, export(here, 1))
    assert there.snapshots() == [] and left_in(little) == []
    collect(there.store, pinned(there.store))
    assert packs_bytes(there) == 0
    there.store.close()


def import_file(home: Home, file: Path) -> None:
    import_(home, file.read_bytes())


@pytest.mark.parametrize("step", ["image-written", "intake", "complete", "manifest-renamed"])
def test_an_import_that_is_killed_leaves_the_snapshot_whole_or_not_at_all(
    here: Home, there: Home, tmp_path: Path, step: str
) -> None:
    memory = memory_of(1)
    save(here, 1, memory)
    (tmp_path / "file").write_bytes(export(here, 1))
    assert killed_at(step, 1, import_file, there, tmp_path / "file")
    there = replace(there, store=Store.open(there.store.directory))
    is_there = there.snapshots() == [snapshot_id(1)]
    assert is_there == (step == "manifest-renamed")
    collect(there.store, pinned(there.store))
    assert is_there or packs_bytes(there) == 0
    if not is_there:
        import_file(there, tmp_path / "file")
    assert_same(there, 1, memory)
