"""Packs: what goes in comes out, and whatever a stranger makes of one is Damaged: no crash, no huge allocation."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkypig.chunks.coding import decompress
from forkypig.chunks.crypt import Key
from forkypig.chunks.format import PAGE_BYTES, as_hashes
from forkypig.chunks.pack import FOOTER_BYTES, HEADER_BYTES, PackFile, encode_footer
from forkypig.chunks.pack_index import PackIndex, find_in
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, InvalidRequest, NotFound
from tests.chunks_rig import pages

KEY = Key(b"k" * 32)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(directory: Path, count: int = 40, key: Key | None = None) -> tuple[Path, list[bytes]]:
    """A pack, and the contents by position."""
    store = Store.open(directory, key)
    with store.writer() as writer:
        writer.add(pages(1, count))
        writer.add_contents([b"x", b"y" * 65536])
        writer.commit()
    path = directory / "packs/0000000000000001.pack"
    pack = PackFile(path, key)
    return path, pack.read_each(range(len(pack)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[bytes]]:
    path, contents = make(tmp_path_factory.mktemp("plain"))
    return path.read_bytes(), contents


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("count", [1, 40, 1500])
def test_what_goes_in_comes_out(tmp_path: Path, key: Key | None, count: int) -> None:
    content = pages(2, count)
    store = Store.open(tmp_path, key)
    with store.writer() as writer:
        references = writer.add(content)
        writer.commit()
    again = Store.open(tmp_path, key)
    assert b"".join(again.read(references.tolist())) == content.tobytes()
    used = references[references != 0]
    assert np.array_equal(again.find(again.hashes(used)), used)
    if key:  # nothing of it is there in clear
        assert content[:64].tobytes() not in (tmp_path / "packs/0000000000000001.pack").read_bytes()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.lists(st.integers(0, 5), min_size=1, max_size=60))
@QUICK
def test_each_content_is_stored_once(tmp_path_factory: pytest.TempPathFactory, one: list[int], two: list[int]) -> None:
    store = Store.open(tmp_path_factory.mktemp("once"))
    made = {value: bytes([value]) * PAGE_BYTES for value in range(6)}
    seen: dict[int, int] = {0: 0}
    for values in (one, two):
        with store.writer() as writer:
            first, second = b"".join(made[v] for v in values), b"".join(made[v] for v in reversed(values))
            references = [*writer.add(first).tolist(), *writer.add(second).tolist()]
            writer.commit()
        for value, reference in zip([*values, *reversed(values)], references, strict=True):
            assert seen.setdefault(value, reference) == reference
    assert sum(len(store.pack(number)) for number in store.numbers) == len(seen.keys() - {0})


def test_a_store_that_stays_open_finds_what_a_new_one_finds(tmp_path: Path) -> None:
    """Packs come, by it and by others, and go."""
    stays = Store.open(tmp_path)
    other = Store.open(tmp_path)
    contents = [b"%d" % number for number in range(60)]
    for number, content in enumerate(contents):
        with (stays if number % 3 else other).writer() as writer:
            writer.add_contents([content, b"all have it"])
            writer.commit()
        if number % 10 == 9:
            with stays.locked():
                other.remove_packs([stays.numbers[number // 20]])
        stays.refresh()
        wanted = as_hashes([blake3(each).digest() for each in [*contents, b"all have it"]])
        found, anew = stays.find(wanted), Store.open(tmp_path).find(wanted)
        assert ((found == 0) == (anew == 0)).all()
        assert (stays.hashes(found[found != 0]) == wanted[found != 0]).all()
    assert 0 < np.count_nonzero(found) < len(found)


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        writer.add(pages(1, 3000))
        raise ZeroDivisionError
    with store.writer() as writer:
        writer.add(bytes(PAGE_BYTES))
        writer.commit()  # nothing new: no pack
    assert list((tmp_path / "packs").iterdir()) == []


def read_all(path: Path, contents: list[bytes]) -> None:
    """Opens and reads; what is given back is right."""
    pack = PackFile(path)
    try:
        for position in range(len(pack)):
            assert pack.read(position) in contents
    finally:
        pack.close()


@given(st.data())
@QUICK
def test_altered_packs_are_damaged(tmp_path: Path, plain: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    whole, contents = plain
    at = data.draw(st.integers(0, len(whole) - 1))
    what = data.draw(st.sampled_from(["flip", "cut", "insert", "zeros"]))
    altered = {
        "flip": whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :],
        "cut": whole[:at],
        "insert": whole[:at] + b"?" + whole[at:],
        "zeros": whole[:at] + bytes(min(4096, len(whole) - at)) + whole[at + 4096 :],
    }[what]
    path = tmp_path / "altered.pack"
    path.write_bytes(altered)
    if altered != whole and not _only_padding(whole, altered):
        with pytest.raises((Damaged, InvalidRequest)):
            read_all(path, contents)


def _only_padding(whole: bytes, altered: bytes) -> bool:
    """Whether they differ only in the bytes between the chunks and the index, which nobody reads."""
    data_end, index_start = struct.unpack_from("<QQ", whole, len(whole) - FOOTER_BYTES + 16)
    same = whole[:data_end] == altered[:data_end] and whole[index_start:] == altered[index_start:]
    return len(whole) == len(altered) and same


@given(st.tuples(*[st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 70000))] * 3))
@QUICK
def test_lying_footers_are_damaged(
    tmp_path: Path, plain: tuple[bytes, list[bytes]], said: tuple[int, int, int]
) -> None:
    whole, contents = plain
    header, index = whole[:HEADER_BYTES], b""
    footer = encode_footer(header, index, *said)
    path = tmp_path / "lying.pack"
    path.write_bytes(whole[:-FOOTER_BYTES] + footer)
    tracemalloc.start()
    with pytest.raises(Damaged):
        read_all(path, contents)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@given(st.data())
@QUICK
def test_lying_indexes_are_damaged(tmp_path: Path, plain: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    """Whoever makes a pack can give any index the right hash."""
    whole, contents = plain
    count, data_end, index_start = struct.unpack_from("<QQQ", whole, len(whole) - FOOTER_BYTES + 8)
    index = bytearray(whole[index_start:-FOOTER_BYTES])
    at = data.draw(st.integers(0, len(index) - 1))
    lie = data.draw(st.binary(min_size=1, max_size=8))[: len(index) - at]
    truth = bytes(index)
    index[at : at + len(lie)] = lie
    if bytes(index) == truth:
        return
    footer = encode_footer(whole[:HEADER_BYTES], bytes(index), count, data_end, index_start)
    path = tmp_path / "lying.pack"
    path.write_bytes(whole[:index_start] + bytes(index) + footer)
    with pytest.raises(Damaged):
        read_all(path, contents)


def test_a_frame_that_says_it_is_huge_is_not_believed() -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    assert zstandard.frame_content_size(frame) == 1 << 26
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(PAGE_BYTES))
    huge_window = b"\x28\xb5\x2f\xfd" + bytes([0b11000000, 0xFF]) + struct.pack("<Q", PAGE_BYTES) + b"\x01\x00\x00"
    for hostile in (frame, unsized, huge_window, b"", frame[:10]):
        tracemalloc.start()
        with pytest.raises(Damaged):
            decompress(hostile, PAGE_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_hashes_that_begin_alike_are_told_apart() -> None:
    have = as_hashes([b"A" * 8 + bytes([n]) * 24 for n in range(5)] + [b"B" * 32])
    index = PackIndex.build(have, np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    wanted = np.concatenate([have[::-1], as_hashes([b"A" * 8 + b"Z" * 24, b"C" * 32, bytes(32)])])
    assert find_in(index.keys, index.order, have, wanted).tolist() == [5, 4, 3, 2, 1, 0, -1, -1, -1]


@pytest.mark.parametrize("small", [0, 30, 10_000])
def test_small_and_large_packs_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr("forkypig.chunks.store.SMALL_CHUNKS", small)
    store, reader = Store.open(tmp_path), Store.open(tmp_path)
    known: list[np.ndarray] = []
    for number, count in enumerate((20, 50, 10, 40)):
        with store.writer() as writer:
            known.append(np.unique(writer.add(pages(number, count)))[1:])
            writer.commit()
        assert not reader.find(store.hashes(known[-1])).any()
        reader.refresh()
        everything = np.concatenate(known)[::-1]
        assert np.array_equal(reader.find(store.hashes(everything)), everything)
    (tmp_path / "packs/0000000000000002.pack").unlink()  # its old content stays mapped
    (tmp_path / "packs/0000000000000002.pack").write_bytes(b"nothing")
    reader = Store.open(tmp_path)
    found = reader.find(store.hashes(everything))
    assert np.array_equal(found, np.where(everything >> np.uint64(32) == 2, np.uint64(0), everything))
    assert list(reader.damaged) == [2]


def test_references_to_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    store = Store.open(tmp_path)
    for reference in (1 << 32 | 99999, 5, 1 << 62, 1 << 63 | 7):
        with pytest.raises(Damaged):
            store.read([reference])
        with pytest.raises(Damaged):
            store.hashes(np.array([reference], np.uint64))
    with pytest.raises(NotFound):
        store.read([77 << 32])


def test_the_right_key_and_no_other(tmp_path: Path) -> None:
    make(tmp_path / "sealed", key=KEY)
    make(tmp_path / "plain")
    for name, key, words in (
        ("sealed", None, "takes a home with that key"),
        ("sealed", Key(b"x" * 32), "and FORKY_STORE_KEY is key"),
        ("plain", KEY, "takes a home without a key"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            Store.open(tmp_path / name, key)
        with pytest.raises(InvalidRequest, match=words):
            PackFile(tmp_path / name / "packs/0000000000000001.pack", key)


def test_sealed_chunks_can_not_be_altered_or_exchanged(tmp_path: Path) -> None:
    path, contents = make(tmp_path, key=KEY)
    whole = path.read_bytes()
    pack = PackFile(path, KEY)
    start, end = (int(offset) for offset in pack.index.offsets[:2])
    path.write_bytes(whole[:start] + whole[start + 1 : end] + whole[start : start + 1] + whole[end:])
    with pytest.raises(Damaged, match="altered"):
        PackFile(path, KEY).read(0)
    assert PackFile(path, KEY).read(1) == contents[1]
    # The same index under a header with another salt: another key, so nothing opens.
    header = whole[:24] + bytes(32) + whole[56:64]
    start_of_index = struct.unpack_from("<Q", whole, len(whole) - FOOTER_BYTES + 24)[0]
    digest = blake3(header).update(whole[start_of_index:-FOOTER_BYTES]).digest()
    body = whole[-FOOTER_BYTES : -FOOTER_BYTES + 32] + digest
    path.write_bytes(header + whole[64:-FOOTER_BYTES] + body + blake3(body).digest())
    with pytest.raises(Damaged, match="altered"):
        PackFile(path, KEY).read(1)


def test_key_files(tmp_path: Path) -> None:
    made = Key.create(tmp_path / "key")
    assert Key.load(tmp_path / "key") == made
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert made.secret.hex() not in repr(made)
    with pytest.raises(FileExistsError):
        Key.create(tmp_path / "key")
    (tmp_path / "short").write_text("abcd")
    (tmp_path / "words").write_text("nothing\xff")
    for name in ("short", "words", "missing"):
        with pytest.raises(InvalidRequest):
            Key.load(tmp_path / name)
