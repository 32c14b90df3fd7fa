"""Intents: what was asked for, written down before it is done, so that after a crash it can be finished or undone."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from forkypig.model import MachineId, SnapshotId
from forkypig.model.access import DEFAULT_TENANT


class IntentKind(Enum):
    RUN = "run"  # `machines`: the one that is made, or, with `pool` among the arguments, taken of a pool
    FORK = "fork"  # `machines`: the children; `source`: the machine that splits (None: a snapshot was forked)
    SNAPSHOT = "snapshot"  # of `source`
    TEMPLATE = "template"  # the first ready moment of an image
    CHANGE = "change"  # pause, resume, stop, start … of `source`; `snapshot`: what it is restored from, hibernates into
    ACQUIRE = "acquire"  # `machines`: the one of a pool that somebody is given
    REMOVE_MACHINE = "remove-machine"  # `machines`: the one that goes
    REMOVE_SNAPSHOT = "remove-snapshot"


class IntentStatus(Enum):
    OPEN = "open"  # under way, or left over by a controller that died
    UNDOING = "undoing"  # it failed or was cancelled: what it made has to go
    DONE = "done"
    UNDONE = "undone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """One operation. `machines` and `snapshot` are ids that it makes or removes, chosen before it began."""

    id: int
    kind: IntentKind
    status: IntentStatus = IntentStatus.OPEN
    machines: tuple[MachineId, ...] = ()
    snapshot: SnapshotId | None = None
    source: MachineId | None = None
    tenant: str = DEFAULT_TENANT  # who asked for it
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    owner: int | None = None  # the fencing number of the controller at it, where several share a database

    @property
    def makes(self) -> frozenset[str]:
        """The ids that exist on the host because of it, if it is one that makes things."""
        if self.kind in (IntentKind.REMOVE_MACHINE, IntentKind.REMOVE_SNAPSHOT, IntentKind.CHANGE):
            return frozenset()
        return frozenset((*self.machines, *((self.snapshot,) if self.snapshot else ())))

    @property
    def names(self) -> frozenset[str]:
        """Every id that it is about."""
        return frozenset(i for i in (*self.machines, self.snapshot, self.source) if i)
