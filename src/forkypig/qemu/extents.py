"""What a qcow2 overlay holds itself, and where in its file: what is to be kept of a layer when a disk is packed.

`qemu-img map` reads the layer alone (`backing` is null), so what lies below it, which may be the pager's own file, is
never opened. Source of the fields: docs/tools/qemu-img.rst in QEMU's source, "map"; `present` is there from 6.1 on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forkypig.errors import MachineFailed
from forkypig.qemu.image_tool import qemu_img

# Reads the two levels of tables: 0.2 s for a terabyte that is scattered to the utmost, and the disk may be slow.
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the guest's disk that a layer holds, in bytes; whole clusters, but for the disk's end."""

    guest_offset: int
    length: int
    file_offset: int | None  # of its first byte in the layer's file; None: it reads as zeros


async def own_extents(layer: Path) -> Sequence[Extent]:
    """The ranges of a qcow2 file that are not its backing file's, in ascending order.

    For a file that nobody writes; a QEMU that was frozen may have it open. Raises MachineFailed when it can't be read
    or holds what `Overlays` never makes (compressed clusters).
    """
    # Not --image-opts: there a comma in the path would have to be doubled, once per level.
    options = {
        "driver": "qcow2",
        "backing": None,
        "file": {"driver": "file", "filename": str(layer), "locking": "off"},
    }
    name = "json:" + json.dumps(options)
    return parse_map(await qemu_img("map", "--force-share", "--output=json", name, timeout_s=_TIMEOUT_S), layer)


def parse_map(text: str, layer: Path) -> Sequence[Extent]:
    """The extents in what `qemu-img map --output=json` printed for `layer` alone."""
    extents = []
    for entry in json.loads(text):
        if entry["present"] is False:
            continue
        if not entry["zero"] and "offset" not in entry:
            raise MachineFailed(f"{layer} has compressed clusters at {entry['start']}: no overlay of ours has any")
        extents.append(Extent(entry["start"], entry["length"], None if entry["zero"] else entry["offset"]))
    return extents
