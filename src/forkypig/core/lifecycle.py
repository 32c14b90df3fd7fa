"""What may be done to a machine in which state, and which states may follow each other.

Two tables and the sentences that go with them. Whether an operation is under way is not decided here: hostd holds one
operation at a time per machine and answers Busy.
"""

from enum import Enum

from forkypig.errors import NotPossibleNow
from forkypig.model import Machine, MachineState, Shape, Snapshot

S = MachineState


# What QEMU loads must be what was saved: the same disk below, the same CPUs, memory and disk sizes.
def check_restorable(machine: Machine, snapshot: Snapshot) -> None:
    """Raises NotPossibleNow, with the reason, where the machine can't become what the snapshot holds."""
    called = f"snapshot «{snapshot.tag}»" if snapshot.tag else f"snapshot {snapshot.id}"
    if snapshot.image != machine.image:
        raise NotPossibleNow(
            f"machine «{machine.name}» can't go back to {called}, which is of another image ({snapshot.image}, not "
            f"{machine.image}): make a machine of it with forky run --from {snapshot.tag or snapshot.id}"
        )
    if snapshot.shape != machine.shape:
        raise NotPossibleNow(
            f"machine «{machine.name}» can't go back to {called}, which has another shape ({_words(snapshot.shape)}, "
            f"not {_words(machine.shape)}): make a machine of it with forky run --from {snapshot.tag or snapshot.id}"
        )


def _words(shape: Shape) -> str:
    return f"{shape.cpus} CPUs, {shape.memory_mib} MiB of memory, {shape.disk_mib} MiB of disk"


class Action(Enum):
    """Something that is done to one machine; the value completes «busy: …»."""

    FORK = "forking"
    SNAPSHOT = "taking a snapshot"
    PAUSE = "pausing"
    RESUME = "resuming"
    STOP = "stopping"
    START = "starting"
    UPDATE = "updating"
    RESTORE = "restoring"
    HIBERNATE = "hibernating"
    WAKE = "waking"
    REMOVE = "removing"


# Repeating what is done already is fine (pause a paused machine): a caller that lost the answer may ask again.
ALLOWED: dict[Action, frozenset[MachineState]] = {
    Action.FORK: frozenset({S.RUNNING, S.PAUSED}),
    Action.SNAPSHOT: frozenset({S.RUNNING, S.PAUSED}),
    Action.PAUSE: frozenset({S.RUNNING, S.PAUSED}),
    Action.RESUME: frozenset({S.PAUSED, S.RUNNING}),
    Action.STOP: frozenset({S.RUNNING, S.PAUSED, S.STOPPED}),
    Action.START: frozenset({S.STOPPED, S.FAILED, S.RUNNING}),
    Action.UPDATE: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.HIBERNATED, S.FAILED}),
    Action.RESTORE: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.HIBERNATED, S.FAILED}),
    Action.HIBERNATE: frozenset({S.RUNNING, S.PAUSED, S.HIBERNATED}),
    Action.WAKE: frozenset({S.HIBERNATED}),
    Action.REMOVE: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.HIBERNATED, S.FAILED, S.REMOVING}),
}

# A machine that is gone has no state. FAILED can follow anything: QEMU dies when it likes.
TRANSITIONS: dict[MachineState, frozenset[MachineState]] = {
    S.CREATING: frozenset({S.RUNNING, S.PAUSED, S.FAILED, S.REMOVING}),
    S.RUNNING: frozenset({S.PAUSED, S.STOPPED, S.HIBERNATED, S.FAILED, S.REMOVING}),
    S.PAUSED: frozenset({S.RUNNING, S.STOPPED, S.HIBERNATED, S.FAILED, S.REMOVING}),
    S.HIBERNATED: frozenset({S.RUNNING, S.FAILED, S.REMOVING}),
    S.STOPPED: frozenset({S.RUNNING, S.FAILED, S.REMOVING}),
    S.FAILED: frozenset({S.RUNNING, S.STOPPED, S.PAUSED, S.REMOVING}),
    S.REMOVING: frozenset(),
}


def may_become(was: MachineState, now: MachineState) -> bool:
    """Whether a machine in state `was` can be found in state `now` later."""
    return was is now or now in TRANSITIONS[was]


_DOWN = (S.STOPPED, S.FAILED)


def _remedy(machine: Machine, action: Action) -> str:
    name = machine.name
    if machine.state is S.CREATING:
        return "wait until it is ready"
    if machine.state is S.REMOVING:
        return "it will be gone in a moment"
    if machine.state is S.HIBERNATED:
        return f"wake it first (forky wake {name})"
    if action is Action.WAKE:
        return "it is not hibernated" + (f"; boot it with forky start {name}" if machine.state in _DOWN else "")
    if machine.state in _DOWN:
        return f"start it first (forky start {name})"
    if action is Action.START:
        return f"to let it go on: forky resume {name}"
    return "see forky ps"


def check_allowed(machine: Machine, action: Action) -> None:
    """Raises NotPossibleNow, naming the state and the way out, where `action` does not go with the machine's state."""
    if machine.state in ALLOWED[action]:
        return
    why = f" (it failed: {machine.failure})" if machine.state is S.FAILED and machine.failure else ""
    raise NotPossibleNow(
        f"machine «{machine.name}» is {machine.state.value}, so {action.value} is not possible: "
        f"{_remedy(machine, action)}{why}"
    )
