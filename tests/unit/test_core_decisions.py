"""Lifecycle, names, limits, genealogy: the small decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.core import lifecycle, limits
from forkypig.core.genealogy import PASSING, collectable, parents_first, standing_on
from forkypig.core.lifecycle import ALLOWED, TRANSITIONS, Action, check_allowed, may_become
from forkypig.core.names import child_names, free_name, pleasant_name
from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model import (
    Image,
    ImageId,
    Machine,
    MachineId,
    MachineState,
    Shape,
    Snapshot,
    SnapshotId,
    SnapshotKind,
    check_name,
)
from forkypig.model.access import DEFAULT_TENANT

IMAGE = ImageId("i-0123456789ab")


def machine(state: MachineState, name: str = "web", snapshot: str = "") -> Machine:
    ground = SnapshotId(snapshot) if snapshot else None
    return Machine(
        id=MachineId(f"m-{name}"),
        name=name,
        state=state,
        image=IMAGE,
        shape=Shape(),
        snapshot=ground,
        failure="it broke",
    )


def snapshot(name: str, parent: str = "", kind: SnapshotKind = SnapshotKind.FORK) -> Snapshot:
    return Snapshot(
        id=SnapshotId(name),
        kind=kind,
        parent=SnapshotId(parent) if parent else None,
        image=IMAGE,
        shape=Shape(),
        machine_type="",
        qemu_build="",
        accelerator="",
        cpu_model="",
    )


# -- lifecycle ---------------------------------------------------------------------------------------------------------


def test_tables_are_total() -> None:
    assert set(ALLOWED) == set(Action)
    assert set(TRANSITIONS) == set(MachineState)
    assert not TRANSITIONS[MachineState.REMOVING]
    assert all(may_become(state, MachineState.REMOVING) for state in MachineState)
    assert not may_become(MachineState.STOPPED, MachineState.PAUSED)


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("state", MachineState)
def test_refusals_name_the_machine_its_state_and_a_way_out(action: Action, state: MachineState) -> None:
    if state in ALLOWED[action]:
        check_allowed(machine(state), action)
        return
    with pytest.raises(NotPossibleNow, match=rf"«web» is {state.value}, so {action.value} .*: ") as caught:
        check_allowed(machine(state), action)
    assert ("it broke" in str(caught.value)) == (state is MachineState.FAILED)


def test_forks_need_a_machine_that_has_memory() -> None:
    assert lifecycle.ALLOWED[Action.FORK] == {MachineState.RUNNING, MachineState.PAUSED}


# -- names -------------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 40).map(lambda n: f"kid-{n}")), st.integers(1, 30))
def test_child_names_are_the_lowest_free_numbers(taken: set[str], count: int) -> None:
    names = child_names("kid", count, taken)
    assert len(names) == len(set(names)) == count
    assert not taken & set(names)
    highest = int(names[-1].split("-")[1])
    assert {f"kid-{n}" for n in range(1, highest + 1)} == set(names) | {
        t for t in taken if int(t.split("-")[1]) <= highest
    }


def test_child_names_must_be_names() -> None:
    with pytest.raises(InvalidRequest, match="machine name"):
        child_names("Web!", 1, set())
    with pytest.raises(InvalidRequest, match="shorter prefix"):
        child_names("x" * 62, 1, set())
    assert child_names("x" * 61, 9, set())[-1] == "x" * 61 + "-9"


@given(st.randoms(use_true_random=False))
def test_pleasant_names_are_valid_and_free(random: object) -> None:
    taken: set[str] = set()
    for _ in range(50):
        name = pleasant_name(taken, random.randrange)  # type: ignore[attr-defined]
        assert name not in taken
        taken.add(check_name("machine", name))
    # Also when luck always says the same.
    first = pleasant_name((), lambda _n: 0)
    assert pleasant_name({first, f"{first}-2"}, lambda _n: 0) == f"{first}-3"


def test_free_name_stays_a_name() -> None:
    longest = "x" * 63
    assert free_name("web", {"db"}) == "web"
    assert free_name("web", {"web", "web-2"}) == "web-3"
    check_name("machine", free_name(longest, {longest}))


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(1, 128, 1), Shape(64, 4096, 16 << 20)])
def test_shapes_that_go(shape: Shape) -> None:
    limits.check_shape(shape, 4096)


@pytest.mark.parametrize(
    "shape",
    [Shape(0), Shape(65), Shape(1, 0), Shape(1, 127), Shape(1, 4097), Shape(1, 512, 0), Shape(1, 512, (16 << 20) + 1)],
)
def test_shapes_that_do_not(shape: Shape) -> None:
    with pytest.raises(InvalidRequest):
        limits.check_shape(shape, 4096)


def test_zero_is_the_default() -> None:
    assert limits.with_defaults(Shape(0, 0, 0)) == Shape()
    assert limits.with_defaults(Shape(2, 0, 9)) == Shape(2, Shape().memory_mib, 9)


@pytest.mark.parametrize(("count", "goes"), [(0, False), (1, True), (1000, True), (1001, False), (10_000, False)])
def test_counts(count: int, goes: bool) -> None:
    if goes:
        limits.check_count(count)
    else:
        with pytest.raises(InvalidRequest):
            limits.check_count(count)


def test_disk_holds_the_image() -> None:
    image = Image(id=IMAGE, name="debian-12", size_bytes=(100 << 20) + 1, kernel="", sha256="")
    limits.check_disk_holds(Shape(disk_mib=101), image)
    with pytest.raises(InvalidRequest, match="--disk 101M"):
        limits.check_disk_holds(Shape(disk_mib=100), image)


# -- genealogy ---------------------------------------------------------------------------------------------------------


def test_standing_on_says_who() -> None:
    machines = [machine(MachineState.RUNNING, f"m{n}", "s-a") for n in range(5)]
    found = standing_on(SnapshotId("s-a"), machines, [snapshot("s-a"), snapshot("s-b", "s-a")])
    assert found.sentence(DEFAULT_TENANT) == "machines m0, m1, m2 and 2 more and snapshot s-b"
    assert found.sentence("other") == "6 things of other tenants"
    assert not standing_on(SnapshotId("s-b"), machines, [])


def test_whole_branches_are_collected_leaves_first() -> None:
    chain = [snapshot("t", kind=SnapshotKind.TEMPLATE), snapshot("a", "t"), snapshot("b", "a"), snapshot("c", "b")]
    assert collectable(chain, ()) == ["c", "b", "a"]
    assert collectable(chain, {SnapshotId("b")}) == ["c"]
    assert collectable(chain, {SnapshotId("c")}) == []
    assert collectable(chain, (), {"c"}) == []
    assert collectable([*chain, snapshot("k", "b", SnapshotKind.KEPT)], ()) == ["c"]


_forest = st.lists(st.tuples(st.integers(-1, 8), st.sampled_from(list(SnapshotKind)), st.booleans()), max_size=10)


@given(_forest)
def test_what_is_collected_holds_nothing_up(forest: list[tuple[int, SnapshotKind, bool]]) -> None:
    every = [
        snapshot(f"s{n}", f"s{parent}" if 0 <= parent < n else "", kind) for n, (parent, kind, _) in enumerate(forest)
    ]
    occupied = {SnapshotId(f"s{n}") for n, (_, _, busy) in enumerate(forest) if busy}
    gone = collectable(every, occupied)
    left = {s.id: s for s in every}
    for name in gone:
        assert left[name].kind in PASSING
        assert name not in occupied
        assert not any(s.parent == name for s in left.values())
        del left[name]
    # And nothing that could go stays.
    assert not [
        s
        for s in left.values()
        if s.kind in PASSING and s.id not in occupied and not any(o.parent == s.id for o in left.values())
    ]


@given(_forest, st.randoms(use_true_random=False))
def test_parents_come_first(forest: list[tuple[int, SnapshotKind, bool]], random: object) -> None:
    every = [snapshot(f"s{n}", f"s{parent}" if parent >= 0 else "") for n, (parent, _, _) in enumerate(forest)]
    shuffled = list(every)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    ordered = parents_first({s.id: s for s in shuffled})
    assert sorted(s.id for s in ordered) == sorted(s.id for s in every)
    upwards = [s for s in every if s.parent is not None and int(s.parent[1:]) < int(s.id[1:])]
    if len(upwards) == len([s for s in every if s.parent]):  # no circles
        place = {s.id: n for n, s in enumerate(ordered)}
        assert all(place[s.parent] < place[s.id] for s in upwards if s.parent in place)
