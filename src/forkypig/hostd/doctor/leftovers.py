"""What an instance left behind: QEMU processes that nobody can find any more, mounts, sockets of dead daemons.

Only looks and never ends anything: hostd's adoption removes what it knows, so what is found here is for a person.
"""

import asyncio
import errno
import re
import socket
from pathlib import Path

from forkypig.daemon.processes import qemu_processes
from forkypig.daemon.settings import Settings
from forkypig.hostd.checks import Check, ok, warning

PROC = Path("/proc")
_ANSWER_TIMEOUT_S = 3.0  # a mount whose pager lives answers in a millisecond


async def checks(settings: Settings) -> list[Check]:
    """Processes, mounts, sockets."""
    return [
        await asyncio.to_thread(_processes, settings),
        await _mounts(settings),
        await asyncio.to_thread(_sockets, settings),
    ]


def _processes(settings: Settings) -> Check:
    name = "leftover processes"
    lost = lost_processes(settings.home)
    if not lost:
        return ok(name, "every QEMU process of this home has its directory")
    pids = " ".join(map(str, lost))
    return warning(
        name, f"QEMU processes of {settings.home} without a directory: pids {pids}", f"end them: kill -9 {pids}"
    )


def lost_processes(home: Path) -> list[int]:
    """Pids of QEMU processes of this home whose process directory is gone, so that hostd can't adopt them."""
    found = qemu_processes(home, PROC)
    return [pid for pid, process_id in found.items() if not (home / "qemu" / process_id).is_dir()]


async def _mounts(settings: Settings) -> Check:
    """A mount of a dead pager answers ENOTCONN; one of a stuck pager not at all."""
    name = "leftover mounts"
    mounted = await asyncio.to_thread(mounts_below, settings.home)
    bad = []
    for path in mounted:
        if path != settings.memory:
            bad.append(f"{path} is none of ours")
        elif (trouble := await _mount_trouble(path)) is not None:
            bad.append(f"{path} {trouble}")
    if bad:
        return warning(name, "; ".join(bad), "forky down, then umount --lazy PATH")
    return ok(name, f"{'the pager answers at ' + str(mounted[0]) if mounted else 'none'}")


def mounts_below(home: Path) -> list[Path]:
    """Mount points at or below the home, from mountinfo (proc(5): field 5, octal escapes)."""
    lines = (PROC / "self/mountinfo").read_text().splitlines()
    points = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in lines)
    return [path for path in map(Path, points) if path != home and path.is_relative_to(home)]


async def _mount_trouble(path: Path) -> str | None:
    """Asked of a process of its own, which is left behind when it gets no answer: what waits for a stuck server that
    has the request can't be killed before that server answers or ends, and a thread of ours would be stuck, too.
    """
    process = await asyncio.create_subprocess_exec(
        *("stat", "--file-system", "--terse", str(path)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        code = await asyncio.wait_for(process.wait(), _ANSWER_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        return "does not answer: its pager is stuck"
    return None if code == 0 else "is dead: its pager has ended"


def _sockets(settings: Settings) -> Check:
    name = "leftover sockets"
    stale = [path.name for path in sorted(settings.run.glob("*.sock")) if is_stale(path)]
    if stale:
        return warning(name, f"nobody listens on {', '.join(stale)}: a daemon has died", "forky up starts it again")
    return ok(name, "every socket has its daemon")


def is_stale(path: Path) -> bool:
    """Whether nobody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog means that somebody listens
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
