"""Collecting and checking: what is needed stays readable, what is not goes, and damage is told for whom it matters."""

from pathlib import Path

import numpy as np
import pytest

from forkypig.chunks import manifest_file
from forkypig.chunks.check import check
from forkypig.chunks.collect import Moved, collect
from forkypig.chunks.crypt import Key
from forkypig.chunks.store import Store
from forkypig.errors import Busy, Damaged, NotFound
from tests.chunks_rig import assert_memory_readable, assert_readable, pages, save_snapshot, snapshot_id

KEYS = [None, Key(b"k" * 32)]


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / "packs").iterdir())


@pytest.mark.parametrize("key", KEYS)
def test_what_only_removed_snapshots_needed_goes(tmp_path: Path, key: Key | None) -> None:
    store = Store.open(tmp_path, key)
    shared, own = pages(1, 300), pages(2, 300)
    save_snapshot(store, 1, np.concatenate([shared, own]))
    save_snapshot(store, 2, np.concatenate([shared, pages(3, 300)]))
    save_snapshot(store, 3, pages(4, 300))
    before = on_disk(tmp_path)
    manifest_file.remove(store, snapshot_id(1))
    manifest_file.remove(store, snapshot_id(3))
    done = collect(store)
    assert (done.manifests, done.problems) == (1, ())
    assert done.packs_removed == 1 and done.packs_rewritten
    assert before - on_disk(tmp_path) == done.freed_bytes > 0.4 * before
    assert_readable(tmp_path, 2, np.concatenate([shared, pages(3, 300)]), key)
    assert check(store).problems == ()
    again = collect(store)
    assert (again.freed_bytes, again.chunks_removed, again.packs_rewritten) == (0, 0, 0)
    manifest_file.remove(store, snapshot_id(2))
    collect(store)
    assert on_disk(tmp_path) == 0


def test_references_that_somebody_holds_are_kept_and_told_where_they_are(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    held = save_snapshot(store, 1, pages(1, 400))
    held = held[100:110]
    contents = store.read(held.tolist())
    manifest_file.remove(store, snapshot_id(1))
    seen: list[Moved] = []

    def change(moved: Moved) -> None:
        assert store.read(held.tolist()) == contents  # still there
        seen.append(moved)

    done = collect(store, [held], before_removal=change)
    assert done.chunks_kept == len(np.unique(held[held != 0]))
    renamed = done.moved.renamed(held)
    assert np.array_equal(seen[0].renamed(held), renamed)
    assert Store.open(tmp_path).read(renamed.tolist()) == contents
    with pytest.raises(NotFound):
        store.read([int(held[held != 0][0])])
    gone = np.array([(1 << 32) + 5], np.uint64)
    with pytest.raises(Damaged, match="although somebody holds it"):
        done.moved.renamed(gone)


def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    first = save_snapshot(store, 1, pages(1, 50))
    manifest_file.remove(store, snapshot_id(1))
    collect(store)
    second = save_snapshot(Store.open(tmp_path), 2, pages(2, 50))
    assert int(second.max()) >> 32 > int(first.max()) >> 32


def test_many_small_packs_are_put_together(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    for number in range(20):
        save_snapshot(store, number, pages(number, 20))
    assert len(store.numbers) == 20
    collect(store)
    assert len(store.numbers) == 1
    for number in range(20):
        assert_readable(tmp_path, number, pages(number, 20))


def test_a_reader_goes_on_while_its_packs_are_collected(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    references = save_snapshot(store, 1, pages(1, 100))
    save_snapshot(store, 2, pages(1, 100)[: 50 * 4096])
    reader = Store.open(tmp_path)
    before = reader.read(references[:50].tolist())
    manifest_file.remove(store, snapshot_id(1))
    collect(store)
    assert reader.read(references[:50].tolist()) == before  # of the file that has no name any more
    section = manifest_file.load(reader, snapshot_id(2)).memory
    reader.refresh()
    assert reader.read(section.expand(reader).tolist()) == before


def test_one_at_a_time(tmp_path: Path) -> None:
    store, other = Store.open(tmp_path), Store.open(tmp_path)
    with store.writer() as writer:
        writer.add(pages(1, 10))
        with pytest.raises(Busy):
            collect(other, wait=False)
        with pytest.raises(Busy), other.writer(wait=False):
            pass
        writer.commit()
    collect(other, wait=False)


@pytest.mark.parametrize("victim", ["manifests/s-000000000001.manifest", "packs/0000000000000001.pack"])
def test_nothing_is_collected_when_it_is_not_known_what_is_needed(tmp_path: Path, victim: str) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, pages(1, 50))
    save_snapshot(store, 2, pages(2, 50))
    path = tmp_path / victim
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = on_disk(tmp_path)
    store = Store.open(tmp_path)
    with pytest.raises(Damaged):
        collect(store)
    assert on_disk(tmp_path) == before
    assert_memory_readable(tmp_path, 2, pages(2, 50))  # the other is as good as ever


def test_a_check_names_what_is_damaged_and_for_whom(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    references = save_snapshot(store, 1, pages(1, 700))
    save_snapshot(store, 2, pages(2, 100))
    told: list[tuple[int, int]] = []
    good = check(store, lambda done, total: told.append((done, total)))
    assert good.problems == () and (good.packs, good.snapshots) == (2, 2)
    assert told[-1][0] == told[-1][1] == on_disk(tmp_path) == good.stored_bytes
    assert told == sorted(told)
    pack = store.pack(1)
    path = pack.path
    whole = bytearray(path.read_bytes())
    for page in (1, 600):
        whole[int(pack.index.offsets[int(references[page]) & 0xFFFFFFFF]) + 20] ^= 255
    path.write_bytes(whole)
    found = check(Store.open(tmp_path)).problems
    assert [problem.subject for problem in found] == ["pack 0000000000000001"] * 2 + [snapshot_id(1)]
    assert found[-1].text == "2 pages of its memory are damaged"
    path.unlink()
    found = check(Store.open(tmp_path)).problems
    lost = [problem.subject for problem in found if "MiB of its memory are lost" in problem.text]
    assert lost == [snapshot_id(1)]  # the other shares blocks of its disk with it
    assert len(found) < 8  # sentences for people, not a line for each piece


def test_a_pack_that_can_not_be_opened_goes_when_nothing_needs_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, pages(1, 400))
    save_snapshot(store, 2, pages(2, 400))
    path = store.pack(1).path
    content = bytearray(path.read_bytes())
    content[-200] ^= 1  # in the index
    path.write_bytes(content)
    for dry_run in (False, True):
        with pytest.raises(Damaged, match=r"0000000000000001 can't be opened.*nothing was collected.*forky fsck"):
            collect(Store.open(tmp_path), dry_run=dry_run)
    assert {problem.subject for problem in check(Store.open(tmp_path)).problems} == {
        "pack 0000000000000001",
        snapshot_id(1),
        snapshot_id(2),  # which shares blocks of its disk
    }
    for number in (1, 2):
        manifest_file.remove(store, snapshot_id(number))
    save_snapshot(Store.open(tmp_path), 3, pages(2, 400))
    assert collect(Store.open(tmp_path), dry_run=True).freed_bytes >= len(content)
    assert path.exists()
    assert collect(Store.open(tmp_path)).freed_bytes >= len(content)
    assert not path.exists()
    assert check(Store.open(tmp_path)).problems == ()
    assert_readable(tmp_path, 3, pages(2, 400), None)


def test_a_damaged_chunk_is_not_moved(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    references = save_snapshot(store, 1, pages(1, 400))
    save_snapshot(store, 2, pages(1, 200))
    manifest_file.remove(store, snapshot_id(1))
    pack = store.pack(1)
    with pack.path.open("r+b") as file:
        file.seek(int(pack.index.offsets[int(references[7]) & 0xFFFFFFFF]) + 10)
        file.write(b"??????")
    done = collect(Store.open(tmp_path))
    assert "position" in done.problems[0]
    assert pack.path.exists()
    assert list(tmp_path.glob("packs/*.part")) == []


def test_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, pages(1, 50))
    (tmp_path / "touched").mkdir()
    kept = [tmp_path / "touched" / snapshot_id(1), tmp_path / "touched" / f"{snapshot_id(1)}.part"]
    left = [
        tmp_path / "next-pack.77.part",
        tmp_path / "packs/0000000000000009.pack.part",
        tmp_path / f"manifests/{snapshot_id(2)}.manifest.77.part",
        tmp_path / "touched" / snapshot_id(2),
    ]
    for path in (*kept, *left):
        path.write_bytes(b"rest")
    assert collect(store).freed_bytes == 4 * len(left)
    assert [path.exists() for path in (*kept, *left)] == [True] * 2 + [False] * 4
    assert_readable(tmp_path, 1, pages(1, 50))


def test_chunks_that_a_killed_collection_left_twice(tmp_path: Path) -> None:
    """References to either copy are told where the other is before theirs goes."""
    store = Store.open(tmp_path)
    memory = pages(1, 300)
    save_snapshot(store, 1, np.concatenate([memory, pages(2, 300)]))
    save_snapshot(store, 2, memory)
    manifest_file.remove(store, snapshot_id(1))
    held = manifest_file.load(store, snapshot_id(2)).memory.expand(store)

    def die(moved: Moved) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(store, before_removal=die)
    store = Store.open(tmp_path)  # both packs are there
    for _ in range(3):
        fresh = manifest_file.load(store, snapshot_id(2)).memory.expand(store)
        moves: list[Moved] = []
        collect(store, before_removal=moves.append)
        for moved in moves:
            held, fresh = moved.renamed(held), moved.renamed(fresh)
        assert b"".join(store.read(held.tolist())) == memory.tobytes()
        assert b"".join(store.read(fresh.tolist())) == memory.tobytes()


def test_a_dry_run_and_one_that_may_not_move_anything(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    save_snapshot(store, 1, np.concatenate([pages(1, 300), pages(2, 300)]))
    save_snapshot(store, 2, pages(1, 300))
    save_snapshot(store, 3, pages(3, 300))
    before = on_disk(tmp_path)
    would = collect(store, dry_run=True, without=[snapshot_id(1), snapshot_id(3)])
    assert on_disk(tmp_path) == before and len(manifest_file.saved(store)) == 3
    done = collect(store, rewrite=False, without=[snapshot_id(1), snapshot_id(3)])
    assert (would.freed_bytes, would.more_bytes, would.packs_removed) == (
        done.freed_bytes,
        done.more_bytes,
        done.packs_removed,
    )
    assert before - on_disk(tmp_path) == done.freed_bytes > 0 and done.packs_rewritten == 0
    assert manifest_file.saved(store) == [snapshot_id(2)]
    after = on_disk(tmp_path)
    assert collect(store).freed_bytes == after - on_disk(tmp_path) > 0.8 * done.more_bytes > 0
    assert_readable(tmp_path, 2, pages(1, 300))
