"""What can be said about the requirements without any daemon, for when they don't start."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from forkypig import errors
from forkypig.sdk import local
from forkypig.sdk.status import Check, Verdict

_ROOM_BYTES = 2 << 30  # an image, and the overlays of a few machines


def examine() -> Sequence[Check]:
    """QEMU's programs, FUSE, and the room in the home."""
    try:
        place = local.place()
    except errors.InvalidRequest as error:
        return [Check("home", Verdict.FAILED, str(error), "correct FORKY_HOME")]
    return [
        _program(os.environ.get("FORKY_QEMU") or "qemu-system-x86_64", "apt-get install qemu-system-x86"),
        _program("qemu-img", "apt-get install qemu-utils"),
        _program("fusermount3", "apt-get install fuse3"),
        _fuse(),
        _room(place.home),
        Check("python", Verdict.OK, sys.version.split()[0]),
    ]


def _program(name: str, remedy: str) -> Check:
    found = shutil.which(name)
    if found is None:
        return Check(name, Verdict.FAILED, "not found in PATH", remedy)
    return Check(name, Verdict.OK, found)


def _fuse() -> Check:
    device = Path("/dev/fuse")
    if not device.exists():
        return Check("fuse", Verdict.FAILED, "/dev/fuse is missing", "modprobe fuse; in a container, pass the device")
    if not os.access(device, os.R_OK | os.W_OK):
        return Check("fuse", Verdict.FAILED, "/dev/fuse can't be opened", "run as root, or let your user open it")
    return Check("fuse", Verdict.OK, "/dev/fuse can be opened")


def _room(home: Path) -> Check:
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    detail = f"{free / (1 << 30):.1f} GiB free in {there}"
    if free < _ROOM_BYTES:
        return Check("disk", Verdict.WARNING, detail, "make room, or set FORKY_HOME to a larger file system")
    return Check("disk", Verdict.OK, detail)
