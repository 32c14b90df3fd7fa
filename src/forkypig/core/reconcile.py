"""What has to happen so that the controller's records and what the host has agree again.

Used after a crash of either daemon, after a call whose outcome is not known, and after a cancellation: there is one
way to find out what is true, which is to ask the host what is there, and one function that decides what follows.
Things that operations under way are about are left alone (`Records.untouchable`); a later look sees them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from forkypig.core.genealogy import parents_first
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.core.names import free_name
from forkypig.model import Machine, MachineId, MachineState, Snapshot, SnapshotId, SnapshotKind

LOST = "the host does not know it any more: its files or its record there are gone; remove it with forky rm"

_READY = (MachineState.RUNNING, MachineState.PAUSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What the controller has written down. Read before the host is asked."""

    machines: Mapping[MachineId, Machine]
    snapshots: Mapping[SnapshotId, Snapshot]
    intents: tuple[Intent, ...] = ()  # open or undoing, and not under way
    undone: frozenset[str] = frozenset()  # ids that undone intents would have made
    untouchable: frozenset[str] = frozenset()  # ids that operations under way are about
    template_keys: frozenset[object] = frozenset()  # (image, shape) that have a template


@dataclass(frozen=True, slots=True)
class Seen:
    """What the host has."""

    machines: Mapping[MachineId, Machine]
    snapshots: Mapping[SnapshotId, Snapshot]


@dataclass(slots=True)
class Plan:
    """Instructions. First the records, in the order of the fields; then the host's part; then the intents."""

    record_snapshots: list[Snapshot] = field(default_factory=list)  # parents first
    record_machines: list[Machine] = field(default_factory=list)
    forget_machines: list[MachineId] = field(default_factory=list)
    forget_snapshots: list[SnapshotId] = field(default_factory=list)
    templates: list[SnapshotId] = field(default_factory=list)  # to be registered for their image and shape
    remove_machines: list[MachineId] = field(default_factory=list)  # on the host, then here
    remove_snapshots: list[SnapshotId] = field(default_factory=list)
    finished: list[Intent] = field(default_factory=list)
    undone: list[Intent] = field(default_factory=list)
    waiting: list[Intent] = field(default_factory=list)  # the host is still at it: look again later


def merge(row: Machine, seen: Machine, known_snapshots: Collection[SnapshotId | None] = ()) -> Machine:
    """The row with what the host knows better. Name, image name, parent and time of creation are the controller's."""
    snapshot = seen.snapshot if seen.snapshot in known_snapshots else row.snapshot
    return replace(
        row,
        state=seen.state,
        snapshot=snapshot,
        parent=row.parent or seen.parent,
        qemu_pid=seen.qemu_pid,
        address=seen.address,
        failure=seen.failure if seen.state is MachineState.FAILED else "",
        accelerator=seen.accelerator or row.accelerator,
        accelerator_reason=seen.accelerator_reason or row.accelerator_reason,
        operation="",
        config=seen.config,
    )


def plan(records: Records, seen: Seen) -> Plan:
    """What to do. Doing it and looking again gives an empty plan."""
    made = Plan()
    busy = set(records.untouchable)
    unwanted = set(records.undone)  # ids that must not be on the host
    kept_as_fork: set[SnapshotId] = set()  # nobody is to have them, but a machine may stand on them
    for intent in records.intents:
        if intent.names & records.untouchable or _host_is_at_it(intent, seen):
            made.waiting.append(intent)
            busy |= intent.names
        else:
            _settle(intent, seen, made, unwanted, kept_as_fork)
    _compare_snapshots(records, seen, made, busy, kept_as_fork)
    _compare_machines(records, seen, made, busy, unwanted)
    return made


def _host_is_at_it(intent: Intent, seen: Seen) -> bool:
    """Whether the host still works on what the intent asked for."""
    if intent.kind in (IntentKind.REMOVE_MACHINE, IntentKind.REMOVE_SNAPSHOT):
        return False
    source = seen.machines.get(intent.source) if intent.source else None
    if source is not None and source.operation:
        return True
    if intent.status is IntentStatus.UNDOING:
        return False
    return any((m := seen.machines.get(i)) is not None and m.state is MachineState.CREATING for i in intent.machines)


def _settle(intent: Intent, seen: Seen, made: Plan, unwanted: set[str], kept_as_fork: set[SnapshotId]) -> None:
    """Finishes or undoes one intent that nobody is at."""
    if intent.kind is IntentKind.REMOVE_MACHINE:
        made.remove_machines += intent.machines
        made.finished.append(intent)
    elif intent.kind is IntentKind.REMOVE_SNAPSHOT:
        if intent.snapshot is not None:
            made.remove_snapshots.append(intent.snapshot)
        made.finished.append(intent)
    elif intent.kind is IntentKind.CHANGE or (intent.status is IntentStatus.OPEN and _succeeded(intent, seen)):
        made.finished.append(intent)
    else:
        unwanted |= intent.makes
        if intent.snapshot is not None and intent.kind is not IntentKind.TEMPLATE:
            kept_as_fork.add(intent.snapshot)
        made.undone.append(intent)


def _succeeded(intent: Intent, seen: Seen) -> bool:
    """Whether everything that the intent was to make is there and ready."""
    if intent.kind in (IntentKind.SNAPSHOT, IntentKind.TEMPLATE):
        return intent.snapshot in seen.snapshots
    if intent.kind is IntentKind.RUN and intent.arguments.get("pool"):
        return False  # of a pool: whether it has its name and config by now can't be seen
    if intent.kind is IntentKind.ACQUIRE:
        return all((m := seen.machines.get(i)) is not None and m.state is MachineState.RUNNING for i in intent.machines)
    return all((m := seen.machines.get(i)) is not None and m.state in _READY for i in intent.machines)


def _compare_snapshots(records: Records, seen: Seen, made: Plan, busy: set[str], kept_as_fork: set[SnapshotId]) -> None:
    removing = set(made.remove_snapshots)
    tags = {(s.tenant, s.tag) for s in records.snapshots.values() if s.tag}
    template_keys = set(records.template_keys)
    for snapshot in parents_first(seen.snapshots):
        if snapshot.id in busy or snapshot.id in removing:
            continue
        parent = snapshot.parent if snapshot.parent in records.snapshots or snapshot.parent in seen.snapshots else None
        row = records.snapshots.get(snapshot.id)
        if row is not None:
            # The host measures; kind, tag, message, descent and tenant are the controller's. Of two splits of one
            # machine the later may be written down first, before its parent is known.
            current = replace(
                snapshot,
                kind=row.kind,
                tag=row.tag,
                message=row.message,
                parent=row.parent or parent,
                machine=row.machine,
                tenant=row.tenant,
            )
            if current != row:
                made.record_snapshots.append(current)
            continue
        if snapshot.kind is SnapshotKind.TEMPLATE and (key := (snapshot.image, snapshot.shape)) not in template_keys:
            template_keys.add(key)
            made.templates.append(snapshot.id)
        elif snapshot.kind is SnapshotKind.TEMPLATE or snapshot.id in kept_as_fork or snapshot.id in records.undone:
            snapshot = replace(snapshot, kind=SnapshotKind.FORK, tag="")
        tag = snapshot.tag if (snapshot.tenant, snapshot.tag) not in tags else ""
        tags.add((snapshot.tenant, tag))
        made.record_snapshots.append(replace(snapshot, tag=tag, parent=parent))
    made.forget_snapshots += [
        s for s in records.snapshots if s not in seen.snapshots and s not in busy and s not in removing
    ]


def _compare_machines(records: Records, seen: Seen, made: Plan, busy: set[str], unwanted: set[str]) -> None:
    known = (set(records.snapshots) | {s.id for s in made.record_snapshots}) - set(made.forget_snapshots)
    removing = set(made.remove_machines)
    for row in records.machines.values():
        if row.id in busy or row.id in removing:
            continue
        here = seen.machines.get(row.id)
        if row.state is MachineState.REMOVING or (here is not None and row.id in unwanted):
            made.remove_machines.append(row.id)
        elif here is None or (row.state is MachineState.CREATING and here.state not in _READY):
            _missing(row, here, made, is_wanted=row.id not in unwanted)
        elif here.state in (MachineState.REMOVING, MachineState.CREATING):
            continue  # the host says so for a moment only (CREATING: a start), and tells what comes after
        elif (current := merge(row, here, known)) != row:
            made.record_machines.append(current)
    taken = {(m.tenant, m.name) for m in records.machines.values()}
    for here in seen.machines.values():
        if here.id in records.machines or here.id in busy or here.id in removing:
            continue
        if here.id in unwanted:
            made.remove_machines.append(here.id)
        elif here.state not in (MachineState.CREATING, MachineState.REMOVING):
            name = free_name(here.name or here.id, {name for tenant, name in taken if tenant == here.tenant})
            taken.add((here.tenant, name))
            snapshot = here.snapshot if here.snapshot in known else None
            made.record_machines.append(replace(here, name=name, snapshot=snapshot, operation=""))


def _missing(row: Machine, here: Machine | None, made: Plan, *, is_wanted: bool) -> None:
    """A machine that is not on the host, or is there as a wreck that was never handed out. One that nobody wants was
    removed by a controller that did not live to write it down."""
    if row.state is MachineState.CREATING or not is_wanted:
        (made.forget_machines if here is None else made.remove_machines).append(row.id)
    elif row.failure != LOST:
        made.record_machines.append(
            replace(row, state=MachineState.FAILED, failure=LOST, qemu_pid=None, address=None, operation="")
        )
