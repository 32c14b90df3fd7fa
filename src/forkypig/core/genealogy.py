"""Who stands on whom: the tree of snapshots and machines, and what of it nobody needs any more."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from forkypig.model import Machine, Snapshot, SnapshotId, SnapshotKind

_MOST_NAMED = 3
PASSING = (SnapshotKind.FORK, SnapshotKind.HIBERNATION)  # they go when nothing stands on them


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands on one snapshot."""

    machines: tuple[Machine, ...]
    snapshots: tuple[Snapshot, ...]

    def __bool__(self) -> bool:
        return bool(self.machines or self.snapshots)

    @property
    def verb(self) -> str:
        """After the sentence."""
        return "stands" if len(self.machines) + len(self.snapshots) == 1 else "stand"

    def sentence(self, tenant: str) -> str:
        """Who it is, in words for a tenant: "machines web, web-1 and 4 more, and snapshot s-…". Others' things are
        counted, not named."""
        parts = []
        if own := [m.name for m in self.machines if m.tenant == tenant]:
            parts.append(_enumerate("machine", own))
        if own := [s.tag or s.id for s in self.snapshots if s.tenant == tenant]:
            parts.append(_enumerate("snapshot", own))
        if others := sum(m.tenant != tenant for m in self.machines) + sum(s.tenant != tenant for s in self.snapshots):
            parts.append(f"{others} {'things' if others > 1 else 'thing'} of other tenants")
        return " and ".join(parts)


def _enumerate(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{kind}{'s' if len(names) > 1 else ''} {', '.join(sorted(names)[:_MOST_NAMED])}{more}"


def standing_on(snapshot: SnapshotId, machines: Iterable[Machine], snapshots: Iterable[Snapshot]) -> Standing:
    """What would lose its ground if the snapshot went."""
    return Standing(
        tuple(m for m in machines if m.snapshot == snapshot), tuple(s for s in snapshots if s.parent == snapshot)
    )


def collectable(
    snapshots: Iterable[Snapshot], occupied: Collection[SnapshotId], held: Collection[str] = ()
) -> list[SnapshotId]:
    """The snapshots that came with a fork or a hibernation and that nobody needs any more, leaves first.

    `occupied` are those that machines stand on, `held` ids that operations under way need. A snapshot whose only
    ground for staying is another collectable one is in the list too, after it.
    """
    by_id = {s.id: s for s in snapshots}
    dependents: dict[SnapshotId, int] = dict.fromkeys(by_id, 0)
    for snapshot in by_id.values():
        if snapshot.parent in dependents:
            dependents[snapshot.parent] += 1
    taken = set(occupied)
    ready = [s for s in by_id if dependents[s] == 0]
    gone: list[SnapshotId] = []
    while ready:
        snapshot = by_id[ready.pop()]
        if snapshot.kind not in PASSING or snapshot.id in taken or snapshot.id in held:
            continue
        gone.append(snapshot.id)
        if snapshot.parent in dependents:
            dependents[snapshot.parent] -= 1
            if dependents[snapshot.parent] == 0:
                ready.append(snapshot.parent)
    return gone


def history(start: SnapshotId | None, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """The snapshot and what it stands on, newest first."""
    by_id = {s.id: s for s in snapshots}
    chain: dict[SnapshotId, Snapshot] = {}
    while start is not None and start in by_id and start not in chain:
        chain[start] = by_id[start]
        start = by_id[start].parent
    return list(chain.values())


def parents_first(snapshots: Mapping[SnapshotId, Snapshot]) -> list[Snapshot]:
    """The snapshots in an order in which each comes after its parent. A circle is cut where it is met."""
    ordered: dict[SnapshotId, Snapshot] = {}
    for start in snapshots.values():
        path: dict[SnapshotId, Snapshot] = {}
        here: Snapshot | None = start
        while here is not None and here.id not in ordered and here.id not in path:
            path[here.id] = here
            here = snapshots.get(here.parent) if here.parent is not None else None
        for snapshot in reversed(path.values()):
            ordered[snapshot.id] = snapshot
    return list(ordered.values())
