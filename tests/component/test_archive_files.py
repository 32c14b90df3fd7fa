"""Exports and imports: whole, verified, signed; hostile files are refused and leave nothing but rubbish for gc."""

import asyncio
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from forkypig import signatures
from forkypig.archive import tape
from forkypig.archive.head import decode_head
from forkypig.archive.pins import pinned, pinning
from forkypig.chunks.check import check
from forkypig.chunks.collect import collect
from forkypig.chunks.crypt import Key
from forkypig.errors import AlreadyExists, Damaged, InvalidRequest, NotFound, NotPossibleNow
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
    save,
)
from tests.chunks_rig import snapshot_id

KEYS = [None, Key(b"k" * 32)]


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(content)) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def packed(parts: dict[str, bytes]) -> bytes:
    return b"".join(tape.whole(name, content) for name, content in parts.items()) + tape.END


@pytest.mark.parametrize("key", KEYS)
def test_a_snapshot_travels_with_its_image(tmp_path: Path, key: Key | None) -> None:
    here, there = new_home(tmp_path / "here", key), new_home(tmp_path / "there", key)
    image = add_image(here)
    here.images.set_forget_files(image.image_id, ["/etc/secret"])
    memory = memory_of(1)
    save(here, 1, memory)
    save(here, 2, memory_of(2))
    content = export(here, 1, about=replace(ABOUT, forget_files=("/etc/secret",)))
    arrived = import_(there, content)
    assert arrived.head.about.message == "first\nlight" and arrived.manifest is not None
    assert_same(there, 1, memory)
    assert check(there.store).problems == ()
    asyncio.run(there.images.verify(image.image_id))
    assert there.images.forget_files(image.image_id) == ("/etc/secret",)
    disk = there.images.files(image.image_id).disk
    assert disk.stat().st_blocks * 512 < disk.stat().st_size / 2  # holes stayed
    assert packs_bytes(there) < 0.7 * packs_bytes(here)  # exactly the chunks that it needs
    assert collect(there.store).freed_bytes == 0
    again = import_(there, content, known=[snapshot_id(1)])
    assert again.manifest is None and again.head.snapshot == snapshot_id(1)


def test_what_is_here_already_is_not_stored_again(here: Home, there: Home) -> None:
    memory = memory_of(1)
    save(here, 1, memory)
    changed = memory.copy()
    changed[: 20 * 4096] = 77
    save(here, 2, changed)
    import_(there, export(here, 1))
    before = packs_bytes(there)
    arrived = import_(there, export(here, 2, with_image=False))  # the image is there
    assert 0 < arrived.new_chunks < 25
    assert packs_bytes(there) - before < before / 20
    assert_same(there, 2, changed)


def test_without_its_image_it_is_refused(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1))
    with pytest.raises(NotPossibleNow, match="neither here nor in the file"):
        import_(there, export(here, 1, with_image=False))
    assert there.files() == set()


def test_signatures(here: Home, there: Home, tmp_path: Path) -> None:
    save(here, 1, memory_of(1))
    mine, other = tmp_path / "mine", tmp_path / "other"
    public = signatures.create(mine)
    signatures.create(other)
    assert mine.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AlreadyExists):
        signatures.create(mine)
    assert signatures.load_public(tmp_path / "mine.pub") == public
    with pytest.raises(InvalidRequest, match="is not a public key"):
        signatures.load_public(mine)
    signed = export(here, 1, key=mine)
    with pytest.raises(InvalidRequest, match="not signed"):
        import_(there, export(here, 1), trusted=public)
    with pytest.raises(InvalidRequest, match="signed by another key"):
        import_(there, signed, trusted=signatures.load_public(tmp_path / "other.pub"))
    parts = members(signed)
    altered = parts | {"head": parts["head"].replace(b"first", b"worst")}
    assert altered != parts
    with pytest.raises(Damaged, match="altered after it was signed"):
        import_(there, packed(altered), trusted=public)
    assert there.files() == set()
    import_(there, signed, trusted=public)
    assert there.snapshots() == [snapshot_id(1)]


def test_a_signed_head_vouches_for_all_of_it(here: Home, there: Home, tmp_path: Path) -> None:
    """Whatever is exchanged under a valid signature is found."""
    save(here, 1, memory_of(1))
    save(here, 2, memory_of(2))
    public = signatures.create(tmp_path / "key")
    one, two = members(export(here, 1, key=tmp_path / "key")), members(export(here, 2))
    for name in ("manifest", "index", "data"):
        with pytest.raises(Damaged):
            import_(there, packed(one | {name: two[name]}), trusted=public)
    assert there.snapshots() == []


def test_every_flipped_byte_is_found(here: Home, tmp_path: Path) -> None:
    save(here, 1, memory_of(1))
    content = export(here, 1)
    there = new_home(tmp_path / "there")
    random = np.random.default_rng(5)
    found = 0
    for at in sorted(random.integers(0, len(content) - len(tape.END), 24).tolist()):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(random.integers(0, 8))
        try:
            import_(there, bytes(flipped))
        except (Damaged, InvalidRequest, NotPossibleNow):
            found += 1
            assert there.snapshots() == []
        else:  # in the padding, a file's mode or its time: nothing that means anything
            assert_same(there, 1, memory_of(1))
            there = new_home(tmp_path / f"there-{at}")
    assert found > 18


def test_cut_off_anywhere_nothing_is_imported(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1))
    content = export(here, 1)
    for share in np.linspace(0, 0.999, 9):
        with pytest.raises(Damaged):
            import_(there, content[: int(len(content) * share)])
        assert there.snapshots() == []
    collect(there.store, pinned(there.store))
    assert packs_bytes(there) == 0


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "head/../x", "image/../../x", "a" * 99, "manifest ", ""]
)
def test_names_lead_nowhere(here: Home, there: Home, tmp_path: Path, name: str) -> None:
    save(here, 1, memory_of(1))
    parts = members(export(here, 1))
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(there.directory)}
    for at in (0, 2):
        items = list(parts.items())
        items.insert(at, (name, b"evil"))
        with pytest.raises(Damaged):
            import_(there, b"".join(tape.whole(n, c) for n, c in items) + tape.END)
        items[at] = (name, items.pop(at + 1)[1])  # in the place of one that belongs there
        with pytest.raises(Damaged):
            import_(there, b"".join(tape.whole(n, c) for n, c in items) + tape.END)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(there.directory)} == outside
    assert there.snapshots() == []


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        tarfile.AREGTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
    ],
)
def test_nothing_but_plain_files(there: Home, kind: bytes) -> None:
    entry = tarfile.TarInfo("head")
    entry.type, entry.linkname, entry.size = kind, "/etc/passwd", 10 if kind == tarfile.GNUTYPE_LONGNAME else 0
    with pytest.raises(Damaged):
        import_(there, entry.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert there.files() == set()


@pytest.mark.parametrize("size", [1 << 40, -1])
def test_lying_sizes_allocate_nothing(here: Home, there: Home, size: int) -> None:
    save(here, 1, memory_of(1))
    parts = members(export(here, 1))
    for victim in parts:
        content = b""
        for name, part in parts.items():
            if name == victim:
                content += tape.header(name, size) if size > 0 else _negative(name)
            else:
                content += tape.header(name, len(part))
            content += part + tape.padding(len(part))
        with pytest.raises(Damaged):
            import_(there, content + tape.END)
    assert there.snapshots() == []


def _negative(name: str) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = -1
    return entry.tobuf(tarfile.GNU_FORMAT)


def test_a_frame_that_would_grow_without_bound_is_refused(here: Home, there: Home) -> None:
    import zstandard

    save(here, 1, memory_of(1))
    parts = members(export(here, 1))
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(Damaged, match="a part has a wrong length"):
        import_(there, packed(parts | {"image/disk.raw/000000": bomb}))
    assert there.files() == set()


def test_what_the_head_says_is_checked(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1))
    parts = members(export(here, 1))
    good = parts["head"]
    for old, new, error in (
        (b'"format": 1', b'"format": 2', InvalidRequest),
        (b'"network": "tap"', b'"network": "tap,x"', Damaged),
        (b'"mtu": 1500', b'"mtu": true', Damaged),
        (b'"mtu": 1500', b'"mtu": 1e9', Damaged),
        (b'"s-000000000001"', b'"../../../x"', Damaged),
        (b'"tag": "good"', b'"tag": "../x"', Damaged),
        (b"first", b"\\u001b[2J", Damaged),
        (b'"created_us": 17', b'"created_us": 99999999999999999999', Damaged),
        (b'"about": {', b'"about": [{', Damaged),
        (good, b"[" * 100_000, Damaged),
        (good, b"\xff\xfe", Damaged),
    ):
        bad = good.replace(old, new)
        assert bad != good, old
        with pytest.raises(error):
            import_(there, packed(parts | {"head": bad}))
    assert there.files() == set()
    assert decode_head(good).about.pause_ms == 12.5


def test_a_command_line_can_not_be_smuggled_in(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1), cpu_model="max,foo=/etc/passwd")
    with pytest.raises(Damaged, match="neither a machine type"):
        import_(there, export(here, 1))


def test_another_snapshot_by_the_same_id(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1))
    import_(there, export(here, 1))
    other = new_home(there.directory.parent / "other")
    add_image(other)
    save(other, 1, memory_of(2))
    with pytest.raises(NotPossibleNow, match="another snapshot with the id"):
        import_(there, export(other, 1), known=[snapshot_id(1)])
    assert_same(there, 1, memory_of(1))


def test_another_store_key_is_named(tmp_path: Path) -> None:
    here, there = new_home(tmp_path / "here", KEYS[1]), new_home(tmp_path / "there")
    add_image(here)
    save(here, 1, memory_of(1))
    with pytest.raises(InvalidRequest, match="FORKY_STORE_KEY"):
        import_(there, export(here, 1))
    assert there.snapshots() == []


def test_what_is_not_packed_or_not_whole_is_not_exported(here: Home) -> None:
    with pytest.raises(NotFound):
        export(here, 1)
    save(here, 1, memory_of(1))
    for path in (here.store.directory / "packs").iterdir():
        path.unlink()
    here.store.refresh()
    with pytest.raises(Damaged):
        export(here, 1)


def test_what_a_transfer_needs_is_not_collected(here: Home, there: Home) -> None:
    save(here, 1, memory_of(1))
    import_(there, export(here, 1))
    (there.store.directory / "manifests" / f"{snapshot_id(1)}.manifest").unlink()
    with pinning(there.store) as pins:
        hashes = there.store.pack(there.store.numbers[0]).index.hashes
        pins.add(hashes)
        collect(there.store, pinned(there.store))
        assert there.store.find(hashes).all()
    (there.store.directory / "transfers" / "dead.pin").write_bytes(hashes.tobytes())
    collect(there.store, pinned(there.store))
    assert packs_bytes(there) == 0
    assert list((there.store.directory / "transfers").iterdir()) == []
