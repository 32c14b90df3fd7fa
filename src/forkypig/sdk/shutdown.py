"""Ends everything of one home: machines first, by hostd, then the daemons, then what they may have left.

QEMU processes outlive hostd by design, so a home whose daemons died is not empty. Then the pager and hostd are
started once more, adopt what is there, and end it in order: ending QEMU from here would lose the snapshots whose
memory still lies in frozen processes.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from forkypig import errors, model
from forkypig.daemon.home import HomePaths
from forkypig.daemon.processes import qemu_processes
from forkypig.sdk import local, pids
from forkypig.sdk.connection import calls, open_channel
from forkypig.sdk.pids import running_pid
from forkypig.v1 import common_pb2, host_pb2_grpc
from forkypig.wire import convert

log = logging.getLogger(__name__)
# hostd says how far it is at every machine and snapshot; one of them may be gigabytes on a slow disk.
_STEP_S = 600.0
_UNMOUNT_S = 10.0


async def down(at: HomePaths, on_progress: local.OnProgress | None = None, *, force: bool = False) -> bool:
    """Shuts down machines, writes the memory of snapshots to files, ends the daemons. Returns whether any ran.

    Raises HostUnreachable or what hostd raised when the machines could not be shut down: then the daemons are left
    as they are, so that nothing is lost, unless `force` or there are none."""
    if not at.run.is_dir():
        return False
    async with local.locked(at):
        in_order = True
        await local.end_rest(at)
        daemons = local.daemons()
        some_ran = any(running_pid(at.pid_file(daemon)) is not None for daemon in daemons)
        if "hostd" in daemons and (some_ran or _may_have_left_something(at)):
            in_order = await _end_machines(at, on_progress, force=force)
        for daemon in reversed(daemons):
            if on_progress is not None and some_ran:
                on_progress(model.Progress(f"ending the {daemon}"))
            some_ran = await pids.end(daemon, at.pid_file(daemon)) or some_ran
            at.socket(daemon).unlink(missing_ok=True)
        await _unmount(at.memory)
        if in_order:
            local.clean_mark(at).touch(mode=0o600)
        elif left := qemu_processes(at.home):
            log.warning(
                "QEMU runs on, pids %s: `forky up` takes what lives of these machines up again",
                " ".join(map(str, left)),
            )
    return some_ran


async def _end_machines(at: HomePaths, on_progress: local.OnProgress | None, *, force: bool) -> bool:
    """Returns whether all ended in order; raises if not, unless `force` or there is nothing to lose."""
    started = False
    try:
        await local.start(at, ("pager", "hostd"), on_progress)
        started = True
        await _shut_down(at, on_progress)
    except errors.ForkyError as error:
        # A hostd that can't start (its settings are wrong) needs none when there are no machines.
        if not force and (started or _may_have_left_something(at)):
            raise
        log.warning("the machines were not shut down in order, ending the daemons all the same: %s", error)
        return False
    return True


def _may_have_left_something(at: HomePaths) -> bool:
    """Whether QEMU processes may run, or networks be there, although no daemon runs."""
    if at.network_state.exists():
        return True
    if local.clean_mark(at).exists():
        return False
    return any(path.is_dir() and any(path.iterdir()) for path in (at.machines, at.snapshots))


async def _shut_down(at: HomePaths, on_progress: local.OnProgress | None) -> None:
    """Has hostd end all machines. Raises DeadlineExceeded when it stands still."""
    socket = at.socket("hostd")
    async with open_channel(socket) as channel:
        call = host_pb2_grpc.HostStub(channel).Shutdown(common_pb2.Empty())
        while True:
            try:
                async with asyncio.timeout(_STEP_S):
                    with calls(socket):
                        message = await call.read()
            except TimeoutError as error:
                raise errors.DeadlineExceeded(
                    f"hostd has not moved on with the shutdown for {_STEP_S:.0f} s: "
                    f"see {at.logs / 'hostd.log'}, or end it all the same with `forky down --force`"
                ) from error
            if not isinstance(message, common_pb2.Progress):
                return
            if on_progress is not None:
                on_progress(convert.progress_from_wire(message))


def is_mount(path: Path) -> bool:
    """Whether something is mounted there. Not os.path.ismount: it says no on a FUSE mount whose server is gone."""
    wanted = str(path).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(line.split(" ")[4] == wanted for line in mounts)


async def _unmount(path: Path) -> None:
    """Takes away the pager's mount when the pager could not."""
    for argv in (["fusermount3", "-u", str(path)], ["umount", "-l", str(path)]):
        if not is_mount(path):
            return
        log.warning("the pager left its mount %s behind: unmounting it by %s", path, argv[0])
        try:
            child = await asyncio.create_subprocess_exec(
                *argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
            )
        except FileNotFoundError:
            continue
        try:
            await asyncio.wait_for(child.wait(), _UNMOUNT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
    if is_mount(path):
        raise errors.NotPossibleNow(f"{path} is still mounted: end what uses it, then `umount -l {path}`")
