"""Reconciling: whatever the records and the host say, doing what the plan says makes them agree, and loses nothing
that somebody has."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.reconcile import LOST, Plan, Records, Seen, merge, plan
from forkypig.model import ImageId, Machine, MachineId, MachineState, Shape, Snapshot, SnapshotId, SnapshotKind

S = MachineState
IMAGE = ImageId("i-0123456789ab")
MACHINES = [MachineId(f"m-00000000000{n}") for n in range(5)]
SNAPSHOTS = [SnapshotId(f"s-00000000000{n}") for n in range(4)]


def machine(number: int, state: MachineState = S.RUNNING, **fields: object) -> Machine:
    base = Machine(id=MACHINES[number], name=f"m{number}", state=state, image=IMAGE, shape=Shape())
    return replace(base, **fields)  # type: ignore[arg-type]


def snapshot(number: int, kind: SnapshotKind = SnapshotKind.FORK, **fields: object) -> Snapshot:
    base = Snapshot(
        id=SNAPSHOTS[number],
        kind=kind,
        image=IMAGE,
        shape=Shape(),
        machine_type="pc-q35-7.2",
        qemu_build="b",
        accelerator="tcg",
        cpu_model="max",
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def records(machines: list[Machine], snapshots: list[Snapshot] | None = None, *intents: Intent) -> Records:
    return Records(
        machines={m.id: m for m in machines}, snapshots={s.id: s for s in snapshots or []}, intents=tuple(intents)
    )


def seen(machines: list[Machine], snapshots: list[Snapshot] | None = None) -> Seen:
    return Seen({m.id: m for m in machines}, {s.id: s for s in snapshots or []})


def fork(status: IntentStatus = IntentStatus.OPEN) -> Intent:
    return Intent(
        id=1,
        kind=IntentKind.FORK,
        status=status,
        machines=(MACHINES[1], MACHINES[2]),
        snapshot=SNAPSHOTS[0],
        source=MACHINES[0],
    )


PARENT = machine(0)
BORN = [machine(1, S.CREATING), machine(2, S.CREATING)]


def test_agreement_needs_nothing() -> None:
    assert plan(records([PARENT]), seen([PARENT])) == Plan()


def test_fork_that_came_through_is_finished() -> None:
    here = [replace(m, state=S.RUNNING, snapshot=SNAPSHOTS[0]) for m in [PARENT, *BORN]]
    made = plan(records([PARENT, *BORN], [], fork()), seen(here, [snapshot(0)]))
    assert made.finished == [fork()]
    assert [m.id for m in made.record_machines] == MACHINES[:3]
    assert all(m.snapshot == SNAPSHOTS[0] for m in made.record_machines)
    assert not made.remove_machines


def test_fork_that_came_half_through_is_undone_and_the_parent_keeps_its_new_ground() -> None:
    here = [replace(PARENT, snapshot=SNAPSHOTS[0]), machine(1, snapshot=SNAPSHOTS[0])]
    made = plan(records([PARENT, *BORN], [], fork()), seen(here, [snapshot(0)]))
    assert made.undone == [fork()]
    assert made.remove_machines == [MACHINES[1]]
    assert made.forget_machines == [MACHINES[2]]
    assert [m.snapshot for m in made.record_machines] == [SNAPSHOTS[0]]
    assert made.record_snapshots == [snapshot(0)]


def test_fork_that_was_cancelled_is_undone_although_it_came_through() -> None:
    here = [PARENT, machine(1), machine(2)]
    made = plan(records([PARENT, *BORN], [], fork(IntentStatus.UNDOING)), seen(here, [snapshot(0)]))
    assert made.remove_machines == MACHINES[1:3]
    assert made.finished == []


def test_while_the_host_is_at_it_nothing_happens() -> None:
    for here in ([replace(PARENT, operation="forking")], [PARENT, machine(1, S.CREATING)]):
        made = plan(records([PARENT, *BORN], [], fork()), seen(here, [snapshot(0)]))
        assert made == Plan(waiting=[fork()])


def test_operations_under_way_are_left_alone() -> None:
    before = replace(records([PARENT, *BORN]), untouchable=frozenset(fork().names))
    assert plan(before, seen([machine(1)], [snapshot(0)])) == Plan()


def test_lost_machine_has_failed_and_is_told_once() -> None:
    made = plan(records([PARENT]), seen([]))
    assert made.record_machines == [replace(PARENT, state=S.FAILED, failure=LOST)]
    assert plan(records(made.record_machines), seen([])) == Plan()


def test_unknown_machine_is_adopted_or_removed_if_it_was_undone() -> None:
    stranger = machine(3, name="m0")
    made = plan(records([PARENT]), seen([PARENT, stranger]))
    assert made.record_machines == [replace(stranger, name="m0-2")]
    undone = replace(records([PARENT]), undone=frozenset({stranger.id}))
    assert plan(undone, seen([PARENT, stranger])).remove_machines == [stranger.id]
    assert plan(records([PARENT]), seen([PARENT, machine(3, S.CREATING)])) == Plan()


def test_what_was_taken_of_a_pool_is_somebodys_only_if_all_of_it_was_done() -> None:
    acquire = Intent(id=1, kind=IntentKind.ACQUIRE, machines=(MACHINES[0],), arguments={"pool": "p-1"})
    run = replace(acquire, kind=IntentKind.RUN)
    row = machine(0)
    for intent, state, is_theirs in ((acquire, S.RUNNING, True), (acquire, S.PAUSED, False), (run, S.RUNNING, False)):
        made = plan(records([row], [], intent), seen([machine(0, state)]))
        assert made.finished == ([intent] if is_theirs else [])
        assert made.undone == ([] if is_theirs else [intent])
        assert made.remove_machines == ([] if is_theirs else [row.id])


def test_what_was_undone_and_is_removed_already_is_forgotten() -> None:
    """Whoever is killed before that is written down must not leave a machine that has failed, with a lease."""
    acquire = Intent(id=1, kind=IntentKind.ACQUIRE, machines=(MACHINES[0],), arguments={"pool": "p-1"})
    made = plan(records([machine(0, S.PAUSED)], [], acquire), seen([]))
    assert (made.forget_machines, made.record_machines, made.undone) == ([MACHINES[0]], [], [acquire])


def test_removal_is_done_again() -> None:
    intent = Intent(id=1, kind=IntentKind.REMOVE_MACHINE, machines=(MACHINES[0],))
    made = plan(records([machine(0, S.REMOVING)], [], intent), seen([PARENT]))
    assert made == Plan(remove_machines=[MACHINES[0]], finished=[intent])


def test_snapshot_of_an_undone_intent_belongs_to_nobody() -> None:
    intent = Intent(id=1, kind=IntentKind.SNAPSHOT, status=IntentStatus.UNDOING, snapshot=SNAPSHOTS[0])
    made = plan(records([], [], intent), seen([], [snapshot(0, SnapshotKind.KEPT, tag="base")]))
    assert made.record_snapshots == [snapshot(0)]


def test_parent_that_is_written_down_after_its_child_is_found() -> None:
    older, newer = snapshot(0), snapshot(1, parent=SNAPSHOTS[0])
    made = plan(records([], [older, replace(newer, parent=None)]), seen([], [older, newer]))
    assert made.record_snapshots == [newer]
    # One that is not written down yet is no parent, but where it is found now.
    made = plan(records([], [replace(newer, parent=None)]), seen([], [newer]))
    assert made == Plan()


def test_second_template_of_a_key_is_an_ordinary_snapshot() -> None:
    two = [snapshot(0, SnapshotKind.TEMPLATE), snapshot(1, SnapshotKind.TEMPLATE)]
    made = plan(records([]), seen([], two))
    assert made.templates == [SNAPSHOTS[0]]
    assert [s.kind for s in made.record_snapshots] == [SnapshotKind.TEMPLATE, SnapshotKind.FORK]


def test_merge_keeps_what_the_controller_knows() -> None:
    row = machine(0, parent=MACHINES[1], image_name="debian-12", created_us=7)
    here = machine(0, S.PAUSED, name="other", qemu_pid=5, snapshot=SNAPSHOTS[0], operation="pausing", failure="old")
    assert merge(row, here) == replace(row, state=S.PAUSED, qemu_pid=5)
    assert merge(row, here, {SNAPSHOTS[0]}).snapshot == SNAPSHOTS[0]


# -- whatever is the case ----------------------------------------------------------------------------------------------

_rows = st.dictionaries(st.sampled_from(range(5)), st.sampled_from(list(S)))
_snapshot_rows = st.dictionaries(st.sampled_from(range(4)), st.sampled_from(list(SnapshotKind)))
_intents = st.lists(
    st.builds(
        Intent,
        id=st.integers(1, 9),
        kind=st.sampled_from([k for k in IntentKind if k is not IntentKind.REMOVE_SNAPSHOT]),
        status=st.sampled_from([IntentStatus.OPEN, IntentStatus.UNDOING]),
        machines=st.lists(st.sampled_from(MACHINES[1:]), max_size=3, unique=True).map(tuple),
        snapshot=st.sampled_from([None, *SNAPSHOTS]),
        source=st.sampled_from([None, MACHINES[0]]),
    ),
    max_size=2,
    unique_by=lambda i: i.id,
)


def carry_out(made: Plan, before: Records, host: Seen) -> tuple[Records, Seen]:
    """What the reconciler does, in dictionaries."""
    machines, snapshots = dict(before.machines), dict(before.snapshots)
    machines.update({m.id: m for m in made.record_machines})
    snapshots.update({s.id: s for s in made.record_snapshots})
    there, snapshots_there = dict(host.machines), dict(host.snapshots)
    for gone in [*made.forget_machines, *made.remove_machines]:
        machines.pop(gone, None)
    for gone in made.remove_machines:
        there.pop(gone, None)
    for lost in [*made.forget_snapshots, *made.remove_snapshots]:
        snapshots.pop(lost, None)
        machines = {k: replace(m, snapshot=None) if m.snapshot == lost else m for k, m in machines.items()}
        snapshots = {k: replace(s, parent=None) if s.parent == lost else s for k, s in snapshots.items()}
    for lost in made.remove_snapshots:
        snapshots_there.pop(lost, None)
    ended = {*(i.id for i in made.finished), *(i.id for i in made.undone)}
    keys = before.template_keys | {(snapshots[t].image, snapshots[t].shape) for t in made.templates}
    after = Records(
        machines=machines,
        snapshots=snapshots,
        intents=tuple(i for i in before.intents if i.id not in ended),
        undone=before.undone.union(*(i.makes for i in made.undone)),
        template_keys=keys,
    )
    return after, Seen(there, snapshots_there)


@given(_rows, _rows, _snapshot_rows, _snapshot_rows, _intents)
@settings(max_examples=200, deadline=None)
def test_it_comes_to_rest(
    rows: dict[int, MachineState],
    here: dict[int, MachineState],
    snapshot_rows: dict[int, SnapshotKind],
    snapshots_here: dict[int, SnapshotKind],
    intents: list[Intent],
) -> None:
    before = records([machine(n, s) for n, s in rows.items()], [snapshot(n, k) for n, k in snapshot_rows.items()])
    before = replace(before, intents=tuple(intents))
    host = seen([machine(n, s) for n, s in here.items()], [snapshot(n, k) for n, k in snapshots_here.items()])
    mine = {m for i in intents for m in i.machines}
    # One round is enough, but for two intents that are about the same thing: the second waits for the first.
    for _ in range(3):
        made = plan(before, host)
        # A machine that no intent is about, and that was not half-made or on its way out, is never removed.
        for removed in made.remove_machines:
            row = before.machines.get(removed)
            assert removed in mine or (row is not None and row.state in (S.REMOVING, S.CREATING))
        before, host = carry_out(made, before, host)
    again = plan(before, host)
    assert again == Plan(waiting=list(again.waiting))
