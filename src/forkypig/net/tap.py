"""A tap: an Ethernet interface whose other end is a descriptor, for QEMU."""

import fcntl
import os
import struct
from dataclasses import dataclass

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@dataclass(frozen=True, slots=True)
class Tap:
    """An open tap. It vanishes with its last descriptor."""

    fd: int  # close-on-exec; the caller closes it
    name: str


def open_tap(name: str | None = None) -> Tap:
    """Makes a tap in the namespace in which this thread is. `name`: at most 15 bytes; without one the kernel chooses.

    OSError if it can't be, EBUSY if somebody has that one open.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # struct ifreq: 16 bytes of name, the flags, filled up to 40
        request = struct.pack("16sH22x", (name or "tap%d").encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        answer = fcntl.ioctl(fd, TUNSETIFF, request)
    except BaseException:
        os.close(fd)
        raise
    return Tap(fd, answer[:16].rstrip(b"\0").decode())
