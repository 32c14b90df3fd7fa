"""The tree of machines and snapshots: a machine hangs under the snapshot it stands on, a snapshot under its parent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forkypig import model
from forkypig.cli import printing

if TYPE_CHECKING:
    from rich.tree import Tree

_COLOURS = {"running": "green", "paused": "yellow", "failed": "red", "creating": "cyan", "hibernated": "blue"}


@dataclass
class Node:
    """A machine or a snapshot, and what came from it, oldest first."""

    of: model.Machine | model.Snapshot
    children: "list[Node]" = field(default_factory=list)


def flat(roots: "Sequence[Node]") -> list[dict[str, Any]]:
    """One object a node, parents before children. Not nested: a machine that was forked a thousand times is a
    thousand levels deep, which JSON parsers refuse."""
    found = []
    waiting: list[tuple[Node, str | None, int]] = [(root, None, 0) for root in reversed(roots)]
    while waiting:
        node, under, depth = waiting.pop()
        found.append({**_document(node.of), "stands_on": under, "depth": depth})
        waiting += [(child, node.of.id, depth + 1) for child in reversed(node.children)]
    return found


def _document(of: model.Machine | model.Snapshot) -> dict[str, Any]:
    if isinstance(of, model.Machine):
        state = of.state.value
        return {"type": "machine", "id": of.id, "name": of.name, "state": state, "parent": of.parent}
    kind = of.kind.value
    return {
        "type": "snapshot",
        "id": of.id,
        "tag": of.tag or None,
        "message": of.message or None,
        "kind": kind,
        "machine": of.machine,
    }


def grow(machines: Iterable[model.Machine], snapshots: Iterable[model.Snapshot]) -> list[Node]:
    """The roots: snapshots and machines that stand on nothing that is still there."""
    snapshots = list(snapshots)
    nodes = {each.id: Node(each) for each in snapshots}
    every = [(each.parent, nodes[each.id]) for each in snapshots]
    every += [(each.snapshot, Node(each)) for each in machines]
    roots = []
    for stands_on, node in sorted(every, key=lambda pair: pair[1].of.created_us):
        if stands_on is not None and stands_on in nodes:
            nodes[stands_on].children.append(node)
        else:
            roots.append(node)
    return roots


def draw(roots: Sequence[Node]) -> None:
    """Prints the trees."""
    from rich.tree import Tree

    names = {node.of.id: node.of.name for node in _all(roots) if isinstance(node.of, model.Machine)}
    for root in roots:
        drawn = Tree(_label(root, names), guide_style="dim")
        _add(drawn, root, names)
        printing.console().print(drawn)


def _add(drawn: "Tree", node: Node, names: dict[model.MachineId, str]) -> None:
    # With a stack, not by recursion: a thousand generations are a thousand levels.
    waiting = [(drawn, node)]
    while waiting:
        branch, node = waiting.pop()
        waiting += [(branch.add(_label(child, names)), child) for child in node.children]


def _all(roots: Sequence[Node]) -> Iterable[Node]:
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children


def _label(node: Node, names: dict[model.MachineId, str]) -> Any:
    from rich.text import Text

    if isinstance(node.of, model.Machine):
        machine = node.of
        label = Text("● ", style=_COLOURS.get(machine.state.value, "dim"))
        label.append(machine.name, style="bold")
        label.append(f"  {machine.state.value}", style="default")
        if machine.parent is not None:
            label.append(f"  forked from {names.get(machine.parent, machine.parent)}", style="dim")
        return label
    snapshot = node.of
    label = Text("◆ ", style="blue")
    label.append(snapshot.tag or snapshot.id, style="blue")
    label.append(f"  {snapshot.kind.value}", style="default")
    if snapshot.machine is not None:
        label.append(f"  of {names.get(snapshot.machine, snapshot.machine)}", style="dim")
    if snapshot.message:
        label.append(f"  {snapshot.message.partition(chr(10))[0]}", style="italic")
    return label
