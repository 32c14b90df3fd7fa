"""kill -9 of the processes that export and collect, at every step: what was reported stays, and so does all that
somebody holds references to."""

import contextlib
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from forkypig.archive import exporting, parcel
from forkypig.archive.pins import pinned, pinning
from forkypig.chunks import faults, manifest_file
from forkypig.chunks.check import check
from forkypig.chunks.collect import Moved, collect
from forkypig.chunks.format import References
from forkypig.chunks.store import Store
from forkypig.errors import Damaged
from tests.archive_rig import ABOUT, add_image, assert_same, export, import_, memory_of, new_home, quiet, save
from tests.chunks_rig import pages, save_snapshot, snapshot_id
from tests.victims import PROCESSES, exit_code, killed_at, start_until

_OLD, _NEW = 60, 40  # pages: what only the removed snapshot had, and what others have as well


def _export(directory: Path, cut: Path) -> None:
    parcel._CHUNKS_TOGETHER = 64
    here = new_home(directory)
    with pinning(Store.open(here.store.directory)) as pins, cut.open("wb", buffering=0) as file:
        made = exporting.export(here.store, here.images, pins, snapshot_id(1), ABOUT, with_image=True, meter=quiet())
        for piece in made.rest:
            file.write(piece)


@pytest.mark.parametrize("nth", [1, 2])
def test_an_export_that_is_killed_is_no_export_and_holds_nothing(tmp_path: Path, nth: int) -> None:
    here, there = new_home(tmp_path / "here"), new_home(tmp_path / "there")
    add_image(here)
    save(here, 1, memory_of(1))
    before, cut = here.files(), tmp_path / "cut"

    assert killed_at("export-data", _export, here.directory, cut, nth=nth)
    assert cut.stat().st_size > 0
    with pytest.raises(Damaged):
        import_(there, cut.read_bytes())
    assert there.snapshots() == []
    collect(here.store, pinned(here.store))  # its pins are nobody's: they go
    here = replace(here, store=Store.open(here.store.directory))
    assert {path for path in here.files() if "transfers" not in path} == before
    assert not list((here.store.directory / "transfers").iterdir())
    import_(there, export(here, 1))
    assert_same(there, 1, memory_of(1))


class _Holder:
    """Who holds references while somebody else collects, as the pager does: it is told where chunks are now."""

    def __init__(self, store: Store, references: References, content: bytes) -> None:
        self._directory, self.references, self._content = store.directory, references, content

    def moved(self, tables: dict[int, References]) -> None:
        self.references = Moved(tables).renamed(self.references)

    def assert_readable(self) -> None:
        """Asks a store that is opened now: what it knew of packs that are gone does not help it."""
        store = Store.open(self._directory)
        assert b"".join(store.read(self.references.tolist())) == self._content


def _store_with_rubbish(directory: Path) -> _Holder:
    """Packs of which more than a quarter is rubbish, and somebody who holds what is not."""
    store = Store.open(directory)
    kept = pages(7, _NEW)
    for number in (1, 2):
        save_snapshot(store, number, np.concatenate([pages(number, _OLD), kept]))
    holder = _Holder(store, save_snapshot(store, 3, kept), kept.tobytes())
    for number in (1, 2):
        manifest_file.remove(store, snapshot_id(number))
    return holder


def _collect(directory: Path, holder: Connection) -> None:
    def tell(moved: Moved) -> None:
        faults.reach("before it is heard")
        holder.send(dict(moved.tables))
        holder.recv()
        faults.reach("when it was heard")

    collect(Store.open(directory), before_removal=tell)


@pytest.mark.parametrize("step", [*faults.COLLECT_STEPS, "before it is heard", "when it was heard"])
def test_a_collection_that_is_killed_takes_nothing_that_somebody_holds(tmp_path: Path, step: str) -> None:
    """At whatever step it dies: the holder's references are good, whether or not it has heard of the new ones."""
    holder = _store_with_rubbish(tmp_path)
    ours, theirs = PROCESSES.Pipe()
    process = start_until(step, 1, _collect, tmp_path, theirs)
    theirs.close()
    with contextlib.suppress(EOFError):
        while True:
            holder.moved(ours.recv())
            holder.assert_readable()
            ours.send("heard")
    assert exit_code(process) == -signal.SIGKILL, f"step {step} was never reached"
    holder.assert_readable()
    done = collect(Store.open(tmp_path), before_removal=lambda moved: holder.moved(dict(moved.tables)))
    assert done.problems == ()
    holder.assert_readable()
    assert check(Store.open(tmp_path)).problems == ()
    assert [path.name for path in tmp_path.rglob("*.part")] == []
    assert collect(Store.open(tmp_path)).freed_bytes == 0
