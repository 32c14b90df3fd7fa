"""Netlink's formats, against bytes that are written out here."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from forkypig.net import links
from forkypig.net.netlink import _failure, attribute, attributes, message, nested


def test_attributes() -> None:
    assert attribute(3, "up0") == b"\x08\0\x03\0up0\0"
    assert attribute(4, 1500) == b"\x08\0\x04\0\xdc\x05\0\0"
    assert attribute(1, b"\x52\x56\x0a\x70\0\x02") == b"\x0a\0\x01\0\x52\x56\x0a\x70\0\x02\0\0"
    assert nested(18, attribute(1, "veth")) == b"\x10\0\x12\x80" + b"\x09\0\x01\0veth\0\0\0\0"


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_come_back(pairs: list[tuple[int, bytes]]) -> None:
    assert list(attributes(b"".join(attribute(kind, value) for kind, value in pairs))) == pairs


@given(st.binary(max_size=200))
def test_garbage_ends(data: bytes) -> None:
    assert sum(len(value) for _, value in attributes(data)) <= len(data)


def test_a_message_knows_its_length() -> None:
    made = message(16, 0x600, b"x" * 5, attribute(3, "a"))
    assert struct.unpack_from("=IHHII", made) == (len(made), 16, 0x605, 0, 0)
    assert made[16:] == b"xxxxx\0\0\0" + attribute(3, "a")


def test_a_switch_is_one_static_entry() -> None:
    """What `bridge fdb replace 52:54:00:12:34:56 dev … master static` asks for."""
    made = links.point_mac_at(9, bytes.fromhex("525400123456"))
    kind, flags = struct.unpack_from("=4xHH", made)
    assert kind == 28  # RTM_NEWNEIGH
    assert flags == 0x505  # request, acknowledge, create, replace
    assert struct.unpack_from("=BxxxiHBB", made, 16) == (7, 9, 0x40, 0x04, 0)  # AF_BRIDGE, NUD_NOARP, NTF_MASTER
    assert list(attributes(made[28:])) == [(2, bytes.fromhex("525400123456"))]


def test_rates_beyond_32_bits() -> None:
    """bytes per second in tc_ratespec.rate; above 4 GiB/s in an attribute of its own (linux/pkt_sched.h)."""
    for rate, wide in ((300_000, False), (6_000_000_000, True)):
        options = dict(attributes(dict(attributes(links.limit_rate(3, rate, 1500)[36:]))[2]))
        assert struct.unpack_from("=8xI", options[1])[0] == min(rate, 0xFFFFFFFF)
        assert (options[4] == struct.pack("=Q", rate)) if wide else 4 not in options
        assert struct.unpack("=I", options[6])[0] >= 4 * 1500  # a bucket that holds no packet lets none through


def test_what_the_kernel_says_to_a_request() -> None:
    assert _failure(0, struct.pack("=i", 0)) is None
    plain = _failure(0, struct.pack("=i", -17) + bytes(16))
    assert plain is not None
    assert (plain.errno, plain.strerror) == (17, "File exists")
    words = _failure(0x300, struct.pack("=i", -22) + bytes(16) + attribute(1, "Invalid MAC"))
    assert words is not None
    assert words.strerror == "Invalid argument: Invalid MAC"
