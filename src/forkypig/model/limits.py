"""What a machine may use of its host. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one machine's QEMU process; None: the default, which follows from the machine's shape."""

    cpus: float | None = None  # cores' worth of time
    memory_mib: int | None = None  # guest memory, QEMU's own, and the page cache it was the first to touch
    pids: int | None = None  # threads
    io_mib_s: int | None = None  # reads and writes of the disk, each
