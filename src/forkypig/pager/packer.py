"""`python -m forkypig.pager.packer SOCKET_FD STORE`: makes snapshots durable, at the lowest priority.

It stays for the next job, with its imports made, and ends with the holder or with the socket. The store's indexes stay
open and verified too, so that a packing costs nothing that the store's size has a part in; a pack that was collected is
let go of at once (kept_store.py). Jobs come through the socket (packer_link.py):

    length of the job and number of descriptors, u32 each    the descriptors, some with each «+»    the job as JSON

The descriptors are a memfd with the reference of each page of memory, in which those to frozen pages are replaced,
and what frozen processes are read by. On stdout it says how far it is, a line of JSON each:

    {"done": bytes, "total": bytes}          the last one of a job also has disk_bytes and devices_bytes: it is durable
    {"full": text}                           the disk is full: the job has ended
    {"error": text}                          anything else: 〃
"""

import ctypes
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HEADER = struct.Struct("<II")
# The kernel takes 253 descriptors with a message.
FDS_TOGETHER = 200
LAST = ("disk_bytes", "full", "error")  # what only the last line of a job has
_PR_SET_PDEATHSIG = 1


def step_back() -> None:
    """Runs when nobody else wants to, and never longer than the holder. Threads and the disk follow: a thread has the
    policy of the one that starts it, and the kernel takes the class of I/O from it."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def receive(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next job and its descriptors; None when there is none any more."""
    header = connection.recv(HEADER.size, socket.MSG_WAITALL)
    if len(header) < HEADER.size:
        return None
    length, count = HEADER.unpack(header)
    fds: list[int] = []
    while len(fds) < count:
        mark, received, _, _ = socket.recv_fds(connection, 1, FDS_TOGETHER, socket.MSG_CMSG_CLOEXEC)
        if not mark:
            return None
        fds += received
    job = connection.recv(length, socket.MSG_WAITALL)
    return (job, fds) if len(job) == length else None


def say(words: Mapping[str, object]) -> None:
    """Tells the holder."""
    print(json.dumps(words), flush=True)


def serve(connection: socket.socket, directory: Path) -> None:
    """Does jobs until there are none any more."""
    # Here and not above: importing numpy and what packs takes half a second of CPU, and must not keep machines waiting.
    from forkypig.errors import ForkyError, ResourceExhausted
    from forkypig.pager.kept_store import KeptStore
    from forkypig.pager.pack_job import Job, pack

    store = KeptStore(directory)
    while True:
        store.wait(connection)
        if (received := receive(connection)) is None:
            return
        encoded, fds = received
        try:
            pack(Job.decode(encoded).with_descriptors(fds), store.open(), say)
        except ResourceExhausted as error:
            say({"full": str(error)})
        except (ForkyError, OSError) as error:
            store.close()
            say({"error": str(error)})
        finally:
            for fd in fds:
                os.close(fd)
            ctypes.CDLL(None).malloc_trim(0)  # what a job took goes back; packer_link.py has the C library keep it


def main() -> int:
    step_back()
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
