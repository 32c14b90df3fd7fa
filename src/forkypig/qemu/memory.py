"""Where guest memory lies in a QEMU process."""

from pathlib import Path

from forkypig.errors import MachineFailed

_MEMFD = "/memfd:memory-backend-memfd (deleted)"


def address(pid: int, memory: Path | None, size_bytes: int) -> int:
    """The address of `ram0` in the process: of the pager's file `memory`, or of the memfd when it booted cold.

    Raises MachineFailed when it is not there, or not in one piece from the file's beginning.
    """
    path = str(memory) if memory is not None else _MEMFD
    start = end = 0
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError as error:
        raise MachineFailed(f"QEMU process {pid} has ended") from error
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != path:
            continue
        begin, stop = (int(part, 16) for part in fields[0].split("-"))
        if int(fields[2], 16) == 0 and not start:
            start = end = begin
        if begin == end:  # the kernel may have split the mapping in several adjacent ones
            end = stop
    if not start or end - start != size_bytes:
        raise MachineFailed(f"QEMU process {pid} does not map its guest memory as expected ({path})")
    return start
