"""Copies the own pages of a frozen process to a layer file. A program of its own, started by path (settling.py).

A process, not a thread: it runs at the lowest priority, and a thread that was put aside while it held Python's global
lock would let every page fault wait for it. Standard library only, so that it starts in 20 ms.

    copier.py SOURCE_FD BASE TARGET_FD     stdin: pairs of int64, offset and length in bytes

It prints the number of bytes done, a line each; its exit status is an errno, 0 for success.
"""

import array
import errno
import os
import sys

_CHUNK_BYTES = 1 << 20
_PAGE_BYTES = 4096
_ZEROS = bytes(_PAGE_BYTES)
_SAY_EVERY_BYTES = 16 << 20


def yield_to_others() -> None:
    """Lowest CPU priority. The disk is written in the background by the kernel."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)


def write_without_zeros(target: int, data: bytes, offset: int) -> None:
    """Writes the pages of `data` that are not all zeros; the others stay holes of the sparse file."""
    view = memoryview(data)
    start = None
    for at in range(0, len(data), _PAGE_BYTES):
        if data[at : at + _PAGE_BYTES] == _ZEROS:  # memcmp; a memoryview compares item by item
            if start is not None:
                write_all(target, view[start:at], offset + start)
                start = None
        elif start is None:
            start = at
    if start is not None:
        write_all(target, view[start:], offset + start)


def write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count


def copy(source: int, base: int, target: int, ranges: array.array) -> None:  # type: ignore[type-arg]
    done = said = 0
    for offset, length in zip(ranges[::2], ranges[1::2], strict=True):
        end = offset + length
        while offset < end:
            data = os.pread(source, min(_CHUNK_BYTES, end - offset), base + offset)
            if not data:
                raise OSError(errno.ESRCH, "the process has ended")
            write_without_zeros(target, data, offset)
            offset += len(data)
            done += len(data)
            if done - said >= _SAY_EVERY_BYTES:
                said = done
                print(done, flush=True)
    os.fdatasync(target)
    print(done, flush=True)


def main() -> int:
    source, base, target = (int(text) for text in sys.argv[1:4])
    yield_to_others()
    ranges = array.array("q")
    ranges.frombytes(sys.stdin.buffer.read())
    try:
        copy(source, base, target, ranges)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


if __name__ == "__main__":
    sys.exit(main())
