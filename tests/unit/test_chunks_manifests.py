"""Manifests and sections: what goes in comes out, and nothing that a stranger made is believed past its checks."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkypig.chunks import manifest_file
from forkypig.chunks.crypt import Key
from forkypig.chunks.format import BASE, BASE_HASH, HASH_BYTES, PAGE_BYTES, REGION_BYTES, REGION_PAGES, ZERO_HASH
from forkypig.chunks.manifest import BaseImage, DeviceState, Manifest, Needs, make_device_state
from forkypig.chunks.manifest_coding import decode, encode
from forkypig.chunks.section import Section, make_section
from forkypig.chunks.store import Store
from forkypig.errors import Damaged, InvalidRequest, NotFound
from forkypig.model import Shape, SnapshotId
from tests.chunks_rig import assert_readable, pages, save_snapshot, snapshot_id

KEY = Key(b"k" * 32)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

IDS = st.integers(0, 2**48 - 1).map(lambda number: SnapshotId(f"s-{number:012x}"))
TEXTS = st.text(max_size=20)
NUMBERS = st.integers(0, 2**40)
REGIONS = st.lists(st.sampled_from([ZERO_HASH, BASE_HASH, b"h" * HASH_BYTES]), max_size=5)
SECTIONS = REGIONS.map(lambda entries: Section(len(entries) * REGION_BYTES, b"".join(entries)))
MANIFESTS = st.builds(
    Manifest,
    snapshot=IDS,
    parent=st.none() | IDS,
    created_us=NUMBERS,
    shape=st.builds(Shape, NUMBERS, NUMBERS, NUMBERS),
    needs=st.builds(
        Needs,
        qemu_build=TEXTS,
        machine_type=TEXTS,
        cpu_model=TEXTS,
        accelerator=TEXTS,
        cpu=TEXTS,
        cpu_features=st.lists(TEXTS, max_size=3).map(tuple),
    ),
    base=st.none() | st.builds(BaseImage, id=TEXTS, sha256=TEXTS, format=TEXTS),
    devices=st.just(DeviceState(70000, b"d" * 64)),
    memory=SECTIONS,
    disk=SECTIONS,
    labels=st.dictionaries(TEXTS, TEXTS, max_size=3),
)


@given(MANIFESTS, st.sampled_from([None, KEY]))
@QUICK
def test_what_goes_in_comes_out(manifest: Manifest, key: Key | None) -> None:
    assert decode(encode(manifest, key), key) == manifest


@given(MANIFESTS, st.data())
@QUICK
def test_altered_manifests_are_damaged(manifest: Manifest, data: st.DataObject) -> None:
    whole = encode(manifest, None)
    at = data.draw(st.integers(0, len(whole) - 1))
    for altered in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + b"?", whole[at + 1 :]):
        with pytest.raises((Damaged, InvalidRequest)):
            decode(altered, None)


@given(MANIFESTS, st.integers(8, 55), st.binary(min_size=1, max_size=8))
@QUICK
def test_lying_heads_are_damaged(manifest: Manifest, at: int, lie: bytes) -> None:
    """With the right hash, as a stranger can make it."""
    body = encode(manifest, None)[:-HASH_BYTES]
    altered = body[:at] + lie + body[at + len(lie) :]
    try:
        read = decode(altered + blake3(altered).digest(), None)
    except (Damaged, InvalidRequest):
        return
    assert encode(read, None)[:-HASH_BYTES] == altered


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["snapshot", "parent", "created_us", "shape", "needs", "base", "labels", "cpus"]), inner
            )
        ),
    )
    | st.just("[" * 100000)
)
@QUICK
def test_lying_metadata_is_damaged(value: object) -> None:
    text = value.encode() if isinstance(value, str) and value.startswith("[") else json.dumps(value).encode()
    body = struct.pack("<8sHHI8sQQQI4x", b"FPIGMANI", 1, 0, len(text), bytes(8), 0, 0, 0, 0) + text
    with pytest.raises(Damaged):
        decode(body + blake3(body).digest(), None)


def test_an_id_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, pages(1, 20))
    manifest = manifest_file.load(store, snapshot_id(1))
    whole = encode(manifest, None)
    body = whole[:-HASH_BYTES].replace(b"s-000000000001", b"../../../../x1")
    with pytest.raises(Damaged, match="not an id"):
        decode(body + blake3(body).digest(), None)
    for name in ("../x", "s-1", ""):
        with pytest.raises(InvalidRequest):
            manifest_file.load(store, SnapshotId(name))
    (tmp_path / "manifests/s-000000000002.manifest").write_bytes(whole)
    with pytest.raises(Damaged, match="is that of s-000000000001"):
        manifest_file.load(store, snapshot_id(2))


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("count", [1, REGION_PAGES, REGION_PAGES + 1, 3 * REGION_PAGES - 7])
def test_snapshots_of_any_length(tmp_path: Path, key: Key | None, count: int) -> None:
    memory = pages(3, count)
    store = Store.open(tmp_path, key)
    references = save_snapshot(store, 1, memory)
    assert_readable(tmp_path, 1, memory, key)
    section = manifest_file.load(store, snapshot_id(1)).memory
    last = section.expand_regions(store, [section.regions - 1])[0]
    assert np.array_equal(last, references[(section.regions - 1) * REGION_PAGES :])
    assert manifest_file.saved(store) == [snapshot_id(1)]
    manifest_file.remove(store, snapshot_id(1))
    manifest_file.remove(store, snapshot_id(1))
    with pytest.raises(NotFound):
        manifest_file.load(store, snapshot_id(1))


def test_what_did_not_change_is_not_stored_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    memory = pages(4, 4 * REGION_PAGES)
    save_snapshot(store, 1, memory)
    changed = memory.copy()
    changed[2 * REGION_BYTES] ^= 1
    save_snapshot(store, 2, changed)
    # One page, one block, one piece of device state (it ends in the snapshot's number).
    assert len(store.pack(2)) == 3
    assert_readable(tmp_path, 1, memory)
    assert_readable(tmp_path, 2, changed)


def test_regions_of_zeros_and_of_the_base_have_no_block(tmp_path: Path) -> None:
    references = np.zeros(3 * REGION_PAGES, np.uint64)
    references[REGION_PAGES : 2 * REGION_PAGES] = BASE
    references[2 * REGION_PAGES] = BASE
    store = Store.open(tmp_path)
    with store.writer() as writer:
        section = make_section(writer, references, len(references) * PAGE_BYTES)
        assert writer.new_chunks == 1
        writer.commit()
    assert section.blocks[:64] == ZERO_HASH + BASE_HASH
    assert np.array_equal(section.expand(store), references)


def test_blocks_that_are_none(tmp_path: Path) -> None:
    """The hash of a chunk that is there, but is no block, or that names what is no page."""
    store = Store.open(tmp_path)
    with store.writer() as writer:
        page, other = writer.hashes(writer.add_contents([b"p" * PAGE_BYTES, b"o" * 100]))
        block = writer.hashes(writer.add_contents([other.tobytes() * REGION_PAGES]))[0]
        missing = writer.hashes(writer.add_contents([b"m" * 32 * REGION_PAGES]))[0]
        writer.commit()
    for entry, words in (
        (page, "not one hash per page"),
        (other, "bytes, not"),
        (block, "no page"),
        (missing, "not in"),
    ):
        with pytest.raises(Damaged, match=words):
            Section(REGION_BYTES, entry.tobytes()).expand(store)
    with pytest.raises(Damaged, match="not in the store"):
        Section(REGION_BYTES, b"?" * HASH_BYTES).expand(store)


@pytest.mark.parametrize(("size", "blocks"), [(4095, 32), (-4096, 0), (4096, 0), (4096, 64), (1 << 62, 32)])
def test_sizes_that_can_not_be(size: int, blocks: int) -> None:
    with pytest.raises(Damaged):
        Section(size, bytes(blocks))
    with pytest.raises(Damaged):
        DeviceState(size if size != 4095 else 1 << 40, bytes(blocks or 64))


def test_an_empty_device_state(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with store.writer() as writer:
        state = make_device_state(writer, b"")
        writer.commit()
    assert state.read(store) == b""
