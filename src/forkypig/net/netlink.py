"""Netlink, as little of it as the network needs: messages are bytes, and a whole slot goes out in one `send`.

Written out instead of taken from pyroute2 for two reasons that were measured: the switch of a machine from one tap to
the next happens inside the fork's pause and must be one prepared message (0.03 ms here, 1 ms there), and a slot takes
about twenty calls (1 ms each there). The formats are those of linux/netlink.h and linux/rtnetlink.h.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK = 270, 11, 10
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200

# A netlink call is answered by the kernel itself, when it has the RTNL lock. Removing hundreds of interfaces holds that
# for a second; ten would be a defect of the kernel.
TIMEOUT_S = 10.0

_HEADER = struct.Struct("=IHHII")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says how, the text says what in its own words where it has some."""


def attribute(kind: int, value: bytes | int | str) -> bytes:
    """One attribute, padded. An int is 32 bits in the host's order, a str ends in a zero byte."""
    if isinstance(value, int):
        value = struct.pack("=I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data`: (type, value) each. Ends at the first that is not whole."""
    position = 0
    while position + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, position)
        if length < 4 or position + length > len(data):
            return
        yield kind & _NLA_TYPE_MASK, data[position + 4 : position + length]
        position += length + (-length % 4)


def message(kind: int, flags: int, body: bytes, *parts: bytes) -> bytes:
    """A request that is to be acknowledged; `body` is the fixed header of its family."""
    payload = body + b"\0" * (-len(body) % 4) + b"".join(parts)
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 0, 0) + payload


class NetlinkSocket:
    """A netlink socket of the namespace in which the thread is that makes it. One user at a time."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.settimeout(TIMEOUT_S)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Its descriptor. It belongs to its namespace, whichever thread uses it."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes it; twice is fine."""
        self._socket.close()

    def __enter__(self) -> "NetlinkSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, *messages: bytes) -> None:
        """Sends requests in one go and waits until each is acknowledged.

        The kernel works through all of them, also past one that fails; the first failure is raised (NetlinkError).
        """
        if not messages:
            return
        waiting = self._send(messages)
        failure: NetlinkError | None = None
        while waiting:
            for kind, flags, sequence, body in self._receive():
                if kind == NLMSG_ERROR and sequence in waiting:
                    waiting.remove(sequence)
                    failure = failure or _failure(flags, body)
        if failure is not None:
            raise failure

    def dump(self, kind: int, body: bytes, *parts: bytes) -> list[bytes]:
        """Everything of a kind that the kernel knows: what follows the netlink header of each message."""
        (expected,) = self._send((message(kind, NLM_F_DUMP, body, *parts),))
        found: list[bytes] = []
        while True:
            for answer, flags, sequence, payload in self._receive():
                if sequence != expected:
                    continue
                if answer == NLMSG_DONE:
                    return found
                if answer == NLMSG_ERROR:
                    if (failure := _failure(flags, payload)) is not None:
                        raise failure
                    return found
                found.append(payload)

    def _send(self, messages: Iterable[bytes]) -> set[int]:
        """Sends messages, each with a number of its own, so that a late answer is never taken for another's."""
        out, numbers = bytearray(), set[int]()
        for each in messages:
            self._sequence = self._sequence % 0xFFFFFFFF + 1
            numbers.add(self._sequence)
            out += each[:8] + struct.pack("=I", self._sequence) + each[12:]
        self._socket.send(out)
        return numbers

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What one `recv` brought: (type, flags, number, what follows the header) each."""
        data = self._socket.recv(1 << 18)
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
            yield kind, flags, sequence, data[position + _HEADER.size : position + length]
            position += max(length, _HEADER.size) + (-length % 4)


def _failure(flags: int, body: bytes) -> NetlinkError | None:
    """What an acknowledgement says: nothing, or the error, with the kernel's own words where it sent some."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0:
        return None
    text = ""
    if flags & NLM_F_ACK_TLVS:
        (length,) = struct.unpack_from("=I", body, 4)
        offset = 4 + (_HEADER.size if flags & NLM_F_CAPPED else length)
        text = next((value.rstrip(b"\0").decode() for kind, value in attributes(body[offset:]) if kind == 1), "")
    return NetlinkError(-code, f"{os.strerror(-code)}: {text}" if text else os.strerror(-code))
