"""Small decisions of the pager: which mapping holds guest memory, what a load touched, what a disk's layers show."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.pager.disk_stack import flattened, page_ranges
from forkypig.pager.frozen import find_mapping
from forkypig.pager.order import Extent
from forkypig.pager.prefetch import Recording, split

MAPS = """\
55d0c0000000-55d0c0001000 r--p 00000000 fe:00 12 /usr/bin/qemu
7f0000000000-7f0000100000 rw-p 00000000 00:27 5                          /home/f/memory/s-0/memory
7f0000100000-7f0000200000 rw-p 00100000 00:27 5                          /home/f/memory/s-0/memory
7f0000300000-7f0000400000 rw-s 00200000 00:01 77 /memfd:memory-backend-memfd (deleted)
7f0000400000-7f0000500000 rw-s 00700000 00:01 77 /memfd:memory-backend-memfd (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_a_mapping_that_the_kernel_split_is_one() -> None:
    found = find_mapping(MAPS, 0x7F0000000000, 0x200000)
    assert found is not None
    assert (found.start, found.end, found.shared, found.offset, found.inode) == (
        0x7F0000000000,
        0x7F0000200000,
        False,
        0,
        5,
    )


def test_a_shared_mapping_tells_where_in_the_file_it_begins() -> None:
    found = find_mapping(MAPS, 0x7F0000300000, 0x100000)
    assert found is not None
    assert (found.shared, found.offset, found.path) == (True, 0x200000, "/memfd:memory-backend-memfd (deleted)")


def test_neighbours_that_do_not_continue_each_other_are_not_one() -> None:
    assert find_mapping(MAPS, 0x7F0000300000, 0x200000) is None


def test_what_is_not_covered_whole_is_not_found() -> None:
    assert find_mapping(MAPS, 0x7F0000000000, 0x300000) is None
    assert find_mapping(MAPS, 0x1000, 0x1000) is None


def test_a_recording_keeps_the_order_of_asking_and_what_was_pushed() -> None:
    recording = Recording()
    recording.start([(100, 2)])
    recording.add(8 * 4096, 2 * 4096, now_s=1.0)
    recording.add(0, 4096, now_s=1.1)
    recording.add(8 * 4096, 4096, now_s=1.2)
    assert recording.runs == ((100, 2), (8, 2), (0, 1))
    assert Recording.of(recording.runs).runs == recording.runs


def test_the_load_is_served_at_once_and_every_other_run_is_left_out_now_and_then() -> None:
    runs = [(number * 100, 8) for number in range(100)]
    at_once, later = split(runs, 0)
    assert list(at_once) == runs[:32]
    assert set(later) < set(runs[32:])
    assert set().union(*(split(runs, turn)[1] for turn in range(2))) == set(runs[32:])
    assert split([], 5) == ((), ())
    assert split([(0, 5000)], 1) == ((), ((0, 5000),))


def test_what_comes_long_after_the_first_read_is_the_guests() -> None:
    recording = Recording()
    recording.start([])
    recording.add(0, 4096, now_s=50.0)
    recording.add(4096 * 9, 4096, now_s=60.0)
    assert recording.runs == ((0, 1),)
    assert not recording.on


@st.composite
def stacks(draw: st.DrawFn) -> list[list[Extent]]:
    """Layers of disjoint extents in ascending order, as qemu-img maps them."""
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(0, 40), max_size=8)))
        extents = []
        for number, (start, end) in enumerate(pairwise(cuts)):
            if draw(st.booleans()):
                offset = None if draw(st.booleans()) else 1000 * number + 7
                extents.append(Extent(start * 1024, (end - start) * 1024, offset))
        layers.append(extents)
    return layers


@settings(deadline=None)  # time on a busy host says nothing
@given(stacks(), st.integers(1, 5))
def test_a_stack_of_layers_seen_from_above_is_what_bytes_say(layers: list[list[Extent]], most_pages: int) -> None:
    size = 36 * 1024
    expected: dict[int, tuple[int, int | None]] = {}
    for number, extents in reversed(list(enumerate(layers))):
        for start, length, offset in extents:
            for at in range(start, min(start + length, size), 512):
                expected[at] = number, None if offset is None else offset + at - start
    found = {}
    end = 0
    for part in page_ranges(flattened(layers, size), most_pages):
        assert part.first * 4096 >= end
        assert part.pages <= most_pages
        end = (part.first + part.pages) * 4096
        covered = 0
        for piece in part.pieces:
            assert part.first * 4096 <= piece.start < piece.end <= end
            covered += piece.end - piece.start
            for at in range(piece.start, piece.end, 512):
                assert at not in found
                offset = None if piece.file_offset is None else piece.file_offset + at - piece.start
                found[at] = piece.layer, offset
        assert part.is_covered == (covered == part.pages * 4096)
        assert covered > 0
    assert found == expected
