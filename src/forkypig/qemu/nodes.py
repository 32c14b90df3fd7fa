"""QEMU's block nodes of a machine's disk: a pair per layer, `file…` for the file and `disk…` for what is in it.

One place says what options a node has, because a node that is opened again (`fold`) gets the default of every option
that is not named again. Named one by one and not left to the headers, so that every file uses io_uring: a load
activates each node, which reads its metadata again, and through QEMU's thread pool that costs milliseconds a layer, in
the pause (docs/decisions/0005).

`drop-cache` is off: it is for migration between hosts. With it a load flushes each file, starts to write it back, and
throws its pages out of the host's cache, to read them again from the disk, in the pause (docs/decisions/0025).
"""

from pathlib import Path
from typing import Any

TOP = "0"  # of the overlay that is written to; its format node is the guest's disk
_FILE, _FORMAT = "file", "disk"


def file_name(suffix: str) -> str:
    """The name of a layer's file node."""
    return _FILE + suffix


def format_name(suffix: str) -> str:
    """The name of a layer's format node."""
    return _FORMAT + suffix


def suffix_of(name: str) -> str | None:
    """The suffix in a node's name; None for a node that is no layer's."""
    for kind in (_FILE, _FORMAT):
        if name.startswith(kind):
            return name.removeprefix(kind)
    return None


def file_node(suffix: str, path: Path, aio: str) -> dict[str, Any]:
    """The options of a layer's file; `aio` is "io_uring" or "threads"."""
    return {
        "driver": "file",
        "node-name": file_name(suffix),
        "filename": str(path),
        "aio": aio,
        "drop-cache": False,
        **_access(suffix),
    }


def format_node(suffix: str, driver: str, below: str | None) -> dict[str, Any]:
    """The options of what is in it ("raw" or "qcow2"), over the layer with the suffix `below`."""
    backing = {"backing": format_name(below)} if below is not None else {}
    return {
        "driver": driver,
        "node-name": format_name(suffix),
        "file": file_name(suffix),
        **_access(suffix),
        **backing,
    }


def _access(suffix: str) -> dict[str, Any]:
    return {"discard": "unmap"} if suffix == TOP else {"read-only": True}
