"""What hostd's log says of splits and children: where the time of each went, in ms."""

import re
from collections.abc import Collection
from pathlib import Path

_FIELD = re.compile(r'(\w+)=("[^"]*"|\S+)')
# Events and fields as hostd/children.py logs them, in the order in which they happen.
_STEPS = (
    ("child has a shell", "waited_ms", "waited for its turn"),
    ("child has a shell", "shell_ms", "shell"),
    ("child is ready", "load_ms", "load"),
    ("child is ready", "handshake_ms", "handshake"),
)
STEPS = tuple(name for _, _, name in _STEPS)


def _events(log: Path, event: str) -> list[dict[str, str]]:
    """The fields of all lines of an event."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        fields = {name: value.strip('"') for name, value in _FIELD.findall(line)}
        if fields.get("event") == event:
            found.append(fields)
    return found


def saved_ms(log: Path, snapshots: Collection[str]) -> dict[str, float]:
    """How long each split took until the device state was saved: the first part of the pause."""
    return {
        fields["snapshot"]: float(fields["saved_ms"])
        for fields in _events(log, "split")
        if fields["snapshot"] in snapshots
    }


def steps_of_children(log: Path, machines: Collection[str]) -> dict[str, list[float]]:
    """How long each step of each child took; steps that the log does not have are left out."""
    steps: dict[str, list[float]] = {}
    for event, key, name in _STEPS:
        samples = [float(fields[key]) for fields in _events(log, event) if fields["machine"] in machines]
        if samples:
            steps[name] = samples
    return steps
