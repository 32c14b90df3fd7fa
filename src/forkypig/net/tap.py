"""A tap: an Ethernet interface whose other end is a descriptor, for QEMU; and what a split needs of it."""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

TUNSETIFF = 0x400454CA
TUNGETVNETHDRSZ = 0x800454D7
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # linux/if_packet.h
_VNET_HDR_BYTES = 10  # struct virtio_net_hdr; a modern driver's is longer at its end
_LONGEST = 1 << 17  # a segment that the card is to cut up, with its headers


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


class Remainder:
    """The packets that wait in the tap of a QEMU that was stopped, and their way to its successor's tap."""

    def __init__(self, old_fd: int, name: str) -> None:
        """`old_fd` is taken over; `name` is the tap that they go to, in the namespace of this thread. OSError."""
        self._old = old_fd
        self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            self._raw.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            self._raw.bind((name, 0))
        except BaseException:
            self.close()
            raise

    def carry_over(self) -> int:
        """Hands over what is there; returns how many packets. Nobody else reads the old tap any more.

        They came before the switch and were not read before the stop: under load QEMU is behind.
        """
        header_bytes = struct.unpack("I", fcntl.ioctl(self._old, TUNGETVNETHDRSZ, bytes(4)))[0]
        count = 0
        while True:
            try:
                packet = os.read(self._old, _LONGEST)
            except BlockingIOError:
                return count
            self._raw.send(packet[:_VNET_HDR_BYTES] + packet[header_bytes:])
            count += 1

    def close(self) -> None:
        os.close(self._old)
        self._raw.close()
