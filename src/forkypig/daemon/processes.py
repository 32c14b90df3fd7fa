"""The QEMU processes of a home, as their command lines tell: for who can't ask hostd."""

import os
import re
from pathlib import Path

_NAME = re.compile(rb"\0-name\0guest=(q-[0-9a-f]+)[,\0]")


def qemu_processes(home: Path, proc: Path = Path("/proc")) -> dict[int, str]:
    """Pids and process ids (`q-…`), by pid. Both the name and a path below the home must be in the command line: other
    instances' processes are not ours."""
    found: dict[int, str] = {}
    below = b"=" + os.fsencode(str(home).replace(",", ",,")) + b"/"
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command_line = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if (name := _NAME.search(command_line)) and below in command_line:
            found[int(entry.name)] = name[1].decode()
    return dict(sorted(found.items()))
