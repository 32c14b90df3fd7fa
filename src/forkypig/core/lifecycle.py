"""What may be done to a machine in which state, and which states may follow each other.

Two tables and the sentences that go with them. Whether an operation is under way is not decided here: hostd holds one
operation at a time per machine and answers Busy.
"""

from enum import Enum

from forkypig.errors import NotPossibleNow
from forkypig.model import Machine, MachineState

S = MachineState


class Action(Enum):
    """Something that is done to one machine; the value completes «busy: …»."""

    FORK = "forking"
    SNAPSHOT = "taking a snapshot"
    PAUSE = "pausing"
    RESUME = "resuming"
    STOP = "stopping"
    START = "starting"
    UPDATE = "updating"
    REMOVE = "removing"


# Repeating what is done already is fine (pause a paused machine): a caller that lost the answer may ask again.
ALLOWED: dict[Action, frozenset[MachineState]] = {
    Action.FORK: frozenset({S.RUNNING, S.PAUSED}),
    Action.SNAPSHOT: frozenset({S.RUNNING, S.PAUSED}),
    Action.PAUSE: frozenset({S.RUNNING, S.PAUSED}),
    Action.RESUME: frozenset({S.PAUSED, S.RUNNING}),
    Action.STOP: frozenset({S.RUNNING, S.PAUSED, S.STOPPED}),
    Action.START: frozenset({S.STOPPED, S.FAILED, S.RUNNING}),
    Action.UPDATE: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.FAILED}),
    Action.REMOVE: frozenset({S.RUNNING, S.PAUSED, S.STOPPED, S.FAILED, S.REMOVING}),
}

# A machine that is gone has no state. FAILED can follow anything: QEMU dies when it likes.
TRANSITIONS: dict[MachineState, frozenset[MachineState]] = {
    S.CREATING: frozenset({S.RUNNING, S.PAUSED, S.FAILED, S.REMOVING}),
    S.RUNNING: frozenset({S.PAUSED, S.STOPPED, S.FAILED, S.REMOVING}),
    S.PAUSED: frozenset({S.RUNNING, S.STOPPED, S.FAILED, S.REMOVING}),
    S.STOPPED: frozenset({S.RUNNING, S.FAILED, S.REMOVING}),
    S.FAILED: frozenset({S.RUNNING, S.STOPPED, S.PAUSED, S.REMOVING}),
    S.REMOVING: frozenset(),
}


def may_become(was: MachineState, now: MachineState) -> bool:
    """Whether a machine in state `was` can be found in state `now` later."""
    return was is now or now in TRANSITIONS[was]


def _remedy(machine: Machine, action: Action) -> str:
    name = machine.name
    if machine.state is S.CREATING:
        return "wait until it is ready"
    if machine.state is S.REMOVING:
        return "it will be gone in a moment"
    if machine.state in (S.STOPPED, S.FAILED):
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
