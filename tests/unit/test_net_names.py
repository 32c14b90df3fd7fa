"""The name server without a network: resolv.conf, and packets that nobody would send in good faith."""

import os
from ipaddress import IPv4Address
from pathlib import Path

import dns.message
from hypothesis import given, settings
from hypothesis import strategies as st

from forkypig.net.config import NetworkConfig
from forkypig.net.names import NameServer
from forkypig.net.upstream import Upstream, is_answer, parse_resolv_conf


def _server() -> NameServer:
    config = NetworkConfig("t", "fk-t", None, 1500, ("192.0.2.53",), Path("state"))
    return NameServer(config, lambda *_: IPv4Address("10.112.0.2"), policy_of=lambda _: None, name_of=lambda *_: "web")


GOOD = dns.message.make_query("web.forky", "A", use_edns=True).to_wire()


@given(st.binary(max_size=600))
async def test_any_bytes(data: bytes) -> None:
    await _server().answer(data, "10.112.0.2", tcp=False)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
async def test_a_question_with_a_few_bytes_changed(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    answer = await _server().answer(bytes(data), "10.112.0.2", tcp=False)
    assert answer is None or is_answer(bytes(data), answer)


def test_resolv_conf() -> None:
    text = "# nameserver 192.0.2.9\nsearch a b\nnameserver 192.0.2.1 # one\n nameserver\tfd00::1\nnameserver\noptions\n"
    assert parse_resolv_conf(text) == ("192.0.2.1", "fd00::1")
    assert parse_resolv_conf("") == ()


def test_resolv_conf_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    upstream = Upstream((), file)
    assert upstream.servers() == ()
    file.write_text("nameserver 192.0.2.1\n")
    assert upstream.servers() == ("192.0.2.1",)
    stamp = file.stat()
    file.write_text("nameserver 192.0.2.2\n")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert upstream.servers() == ("192.0.2.2",)
    file.unlink()
    assert upstream.servers() == ()
    assert Upstream(("192.0.2.3",), file).servers() == ("192.0.2.3",)


def test_whose_answer_it_is() -> None:
    query = b"\x12\x34\1" + bytes(9)
    assert is_answer(query, b"\x12\x34\x81" + bytes(9))
    assert not is_answer(query, b"\x12\x35\x81" + bytes(9))
    assert not is_answer(query, query)
    assert not is_answer(query, b"\x12\x34\x81")
