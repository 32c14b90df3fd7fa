"""Which pages two sections do not have in common."""

from pathlib import Path

import numpy as np
import pytest

from forkypig.chunks.compare import differing
from forkypig.chunks.format import PAGE_BYTES
from forkypig.chunks.section import make_section
from forkypig.chunks.store import Store
from forkypig.errors import InvalidRequest

PAGES = 2000


def test_pages_that_differ_are_told_as_runs(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    content = np.random.default_rng(7).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    content[100:200] = 0
    changed = content.copy()
    for page in (3, 4, 5, 150, 511, 512, 1999):
        changed[page] ^= 1
    changed[600:610] = 0
    with store.writer() as writer:
        sections = [make_section(writer, writer.add(each.tobytes()), PAGES * PAGE_BYTES) for each in (content, changed)]
        shorter = make_section(writer, writer.add(content[:512].tobytes()), 512 * PAGE_BYTES)
        writer.commit()
    store.refresh()
    found = differing(store, *sections)
    assert found == [(3, 3), (150, 1), (511, 2), (600, 10), (1999, 1)]
    assert differing(store, sections[0], sections[0]) == []
    with pytest.raises(InvalidRequest, match="can't be compared"):
        differing(store, sections[0], shorter)
