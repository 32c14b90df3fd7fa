"""What the worker says to hostd, on one pipe: events as JSON, and data. Each with its kind and its length before it."""

import struct
from typing import IO

EVENT, DATA = b"J", b"D"
FRAME = struct.Struct("<cI")
MOST = 4 << 20


def write(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    """Sends one; data in pieces where it is long."""
    view = memoryview(content)
    for at in range(0, len(view), MOST):
        part = view[at : at + MOST]
        stream.write(FRAME.pack(kind, len(part)))
        stream.write(part)
    if kind == EVENT:
        stream.flush()
