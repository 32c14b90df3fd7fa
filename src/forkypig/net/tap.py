"""A tap: an Ethernet interface whose other end is a descriptor, for QEMU."""

import fcntl
import os
import socket
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


def keep_waiting(name: str) -> None:
    """Puts a frame for nobody into the queue of a tap that is up: all that come after it wait for the machine.

    A QEMU whose machine does not run yet takes one packet off its tap and then no more until it runs (net/tap.c,
    tap_send). That one is lost to the guest: it was read with the header of a card without a driver, which is two
    bytes shorter than what the driver agreed on. Without this it was a packet of a client of the forking machine.
    OSError if it can't be.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind((name, 0))
        raw.send(bytes(60))  # the shortest frame; its destination is no card's address
