"""The steps of a split that are QEMU's: save the device state of a machine that stands still, load it in a shell.

The order, and why it is safe to fail at each step, is in hostd/fork.py. What QEMU does in each is in docs/split.md.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from forkypig.errors import MachineFailed, NotPossibleNow
from forkypig.qemu.process import Process, last_words

_STATE = "state"
_STATE_SET = 1
# From 9.1 on QEMU warns that `fd:` on a file is deprecated (docs/about/deprecated.rst), in every shell's log, where it
# would be the last word of a machine that dies without one of its own. `file:` is there from 8.2 on; tried on 10.0.
_FILE_SINCE = (9, 1)
# One round, as late as QEMU allows, in ms. Not none: then virtio-net frees its timer on load, and deletes it once more
# when the guest resets the card, at its power-off or reboot, which is the end of QEMU (7.2, hw/net/virtio-net.c,
# virtio_net_post_load_device and virtio_net_reset).
_ANNOUNCE = {"announce-rounds": 1, "announce-initial": 100_000}
_LOAD_TIMEOUT_S = 60.0  # 15 ms when idle; a hundred children on two cores take their turns


async def check_can_be_saved(process: Process) -> None:
    """Raises NotPossibleNow when a device can't be saved: xen-save-devices-state itself does not check."""
    answer = await process.session.execute("query-migrate")
    reasons = answer.get("blocked-reasons")
    if reasons:
        raise NotPossibleNow(f"this machine can't be forked: {'; '.join(reasons)}")


async def stop(process: Process) -> None:
    """Stops the vCPUs and completes what the disks have under way."""
    await process.session.execute("stop")


async def resume(process: Process) -> None:
    """Lets the vCPUs run; takes the disks back when `save` had released them."""
    await process.session.execute("cont")


async def is_running(process: Process) -> bool:
    """Whether the vCPUs run."""
    return bool((await process.session.execute("query-status"))["running"])


async def save(process: Process, path: Path) -> None:
    """Writes the device state of a stopped machine (some 30 KiB, no memory) and releases its disks.

    `live` is what makes QEMU flush and inactivate the block nodes, so that others may open them.
    """
    await process.session.execute("xen-save-devices-state", {"filename": str(path), "live": True})


@contextlib.contextmanager
def device_state(path: Path) -> Iterator[int]:
    """A descriptor on the device state at its beginning. Each load needs its own: they share no offset.

    May be opened before the state is written: QEMU truncates the file and keeps the inode.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def copied_state(path: Path) -> Iterator[int]:
    """The same for device state that has been packed: all of it is read from the pager's file, and so verified, before
    a load begins, and lies in memory. Blocks until the pager has answered. Raises MachineFailed."""
    try:
        state = path.read_bytes()
    except OSError as error:
        raise MachineFailed(f"the device state in {path} can't be read: {error.strerror}") from error
    with os.fdopen(os.memfd_create("device-state"), "wb") as memory:
        memory.write(state)
        memory.flush()
        # QEMU takes a descriptor for reading only by its access mode, and a memfd's first one is for both.
        fd = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def offer_state(process: Process, path: Path, *, packed: bool = False) -> None:
    """Gives a shell its descriptor of the device state, ahead of the pause. `packed`: `path` is the pager's.

    And puts off the announcements by which a migrated machine tells switches where it is now: no switch has to know,
    and under TCG each of the five rounds keeps the guest's kernel busy for 60 ms right after the pause.
    """
    await process.session.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
    )
    await process.session.execute("migrate-set-parameters", _ANNOUNCE)
    with contextlib.ExitStack() as stack:
        if packed:
            fd = await asyncio.to_thread(stack.enter_context, copied_state(path))
        else:
            fd = stack.enter_context(device_state(path))
        if process.session.version >= _FILE_SINCE:
            await process.session.send_descriptor_set(fd, _STATE_SET)
        else:
            await process.session.send_descriptor(fd, _STATE)


async def load(process: Process, *, paused: bool) -> None:
    """Loads the device state that `offer_state` gave, and returns as soon as the vCPUs run (or, for a shell that was
    started paused, when all is loaded).

    Waits for events and does not poll: the monitor parses JSON a byte at a time, in the thread that does the load.
    """
    uri = f"file:/dev/fdset/{_STATE_SET}" if process.session.version >= _FILE_SINCE else f"fd:{_STATE}"
    with process.session.events("RESUME", "MIGRATION") as events:
        await process.session.execute("migrate-incoming", {"uri": uri})
        while True:
            event = await events.next(_LOAD_TIMEOUT_S)
            if event["event"] == "RESUME":
                return
            status = event["data"]["status"]
            if status == "failed":
                raise MachineFailed(f"QEMU {process.id} could not load its state: {last_words(process.directory)}")
            if status == "completed" and paused:
                return
