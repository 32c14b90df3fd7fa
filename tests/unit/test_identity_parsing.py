"""What a greeting says of an identity, and what the agent makes of the kernel's answers. No kernel here."""

import itertools
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.agent import agent as wire
from forkypig.errors import InvalidRequest
from forkypig.guest.identity import Identity

ME = Identity(hostname="child-1", machine_id="0123456789abcdef" * 2)


# -- the greeting


def test_a_fork_does_all_that_may_be_inherited() -> None:
    fields = dict(ME.fields("f" * 32))
    assert set(fields) == {
        *("entropy", "hostname", "machine-id", "generation", "clock", "boot-id"),
        *("neighbours", "dhcp", "ssh", "hooks"),
    }
    assert len(fields["entropy"]) == 64
    assert fields["entropy"] != dict(ME.fields("f" * 32))["entropy"]
    assert fields["boot-id"] != dict(ME.fields("f" * 32))["boot-id"]


def test_a_boot_takes_on_names_alone() -> None:
    identity = Identity(hostname="a", machine_id="0" * 32, forked=False, tcp="reset")
    assert set(dict(identity.fields("g"))) == {"entropy", "hostname", "machine-id", "generation", "clock"}


@pytest.mark.parametrize(("tcp", "said"), [("reset", "reset"), ("silent", None), ("keep", None)])
def test_connections_are_touched_on_request_alone(tcp: str, said: str | None) -> None:
    identity = Identity(hostname="a", machine_id="0" * 32, tcp=tcp)  # type: ignore[arg-type]
    assert dict(identity.fields("g")).get("tcp") == said


def test_what_is_to_be_forgotten_is_a_list() -> None:
    identity = Identity(hostname="a", machine_id="0" * 32, forget=("A", "B"), forget_files=("/a", "/b c"))
    fields = dict(identity.fields("g"))
    assert fields["forget"] == "A\0B"
    assert fields["forget-files"] == "/a\0/b c"


def test_the_longest_greeting_is_one_frame_that_is_understood() -> None:
    """An unnumbered frame that is longer than the decoder takes would be noise, and the child never ready."""
    identity = Identity(
        hostname="h" * 253,
        machine_id="0" * 32,
        boot_id="01234567-89ab-cdef-0123-456789abcdef",
        tcp="reset",
        forget=("N" * 1498,),
        forget_files=("/" + "f" * 1499,),
    )
    identity.check()
    fields = [("session", "f" * 32), ("orphans", "kill"), *identity.fields("f" * 32)]
    decoder = wire.Decoder()
    decoder.feed(wire.encode(wire.HELLO, 1, payload=wire.pack(*fields)))
    [frame] = decoder.frames()
    assert dict(wire.unpack(frame.payload))["forget"] == b"N" * 1498


@pytest.mark.parametrize(
    "change",
    [
        *({"hostname": ""}, {"hostname": "a b"}, {"machine_id": "0" * 31}, {"machine_id": "X" * 32}),
        *({"boot_id": "x"}, {"boot_id": "01234567-89AB-cdef-0123-456789abcdef"}),
        *({"forget": ("",)}, {"forget": ("A=1",)}, {"forget": ("A\0B",)}),
        *({"forget_files": ("a",)}, {"forget_files": ("/",)}, {"forget_files": ("//..",)}, {"forget_files": ("/\0",)}),
        *({"forget": ("N" * 3000,)},),
    ],
)
def test_nonsense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Identity(**{"hostname": "a", "machine_id": "0" * 32, **change}).check()  # type: ignore[arg-type]


# -- the answer


@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=400)), max_size=60))
def test_an_answer_always_fits_and_begins_with_the_entropy(steps: list[tuple[str, str]]) -> None:
    packed = wire.report([("entropy", "why"), *steps])
    assert len(packed) < 4096 - 300  # what else is in the frame
    fields = wire.unpack(packed)
    assert fields[0] == ("step:entropy", b"why")
    assert len(fields) == len(steps) + 1 or fields[-1][0] == "step:hook:more"


# -- connections

LISTEN, ESTABLISHED, TIME_WAIT = 10, 1, 6


def entry(local: str, remote: str, family: int = 2, state: int = ESTABLISHED) -> bytes:
    """An inet_diag_msg of a connection; addresses as "10.0.2.15:80", for IPv6 the last four bytes of one."""

    def end(text: str) -> tuple[bytes, bytes]:
        host, _, port = text.rpartition(":")
        if host == "::1":
            return bytes(15) + b"\x01", struct.pack(">H", int(port))
        ip = bytes(int(part) for part in host.removeprefix("::ffff:").split("."))
        mapped = bytes(10) + b"\xff\xff" + ip
        return (mapped if family == 10 else ip + bytes(12)), struct.pack(">H", int(port))

    (source, source_port), (destination, destination_port) = end(local), end(remote)
    return (
        struct.pack("BBBB", family, state, 0, 0)
        + source_port
        + destination_port
        + source
        + destination
        + struct.pack("=III", 2, 7, 9)
        + bytes(20)
    )


def test_only_connections_to_others_are_ended() -> None:
    outer = entry("10.0.2.15:40000", "10.112.0.9:7000")
    pair = [entry("10.0.2.15:40001", "10.0.2.15:80"), entry("10.0.2.15:80", "10.0.2.15:40001")]
    loop = entry("127.0.0.1:40002", "127.0.0.9:80")  # its other end is closed already
    six = entry("::1:5", "::1:6", family=10)
    assert wire.outer_connections([outer, *pair, loop, six]) == [outer]


def test_a_listener_of_both_families_is_an_end_like_any() -> None:
    """The accepted socket is an IPv6 one whose addresses are mapped; the client's is an IPv4 one."""
    client = entry("10.0.2.15:40001", "10.0.2.15:80")
    accepted = entry("::ffff:10.0.2.15:80", "::ffff:10.0.2.15:40001", family=10)
    outer = entry("::ffff:10.0.2.15:80", "::ffff:10.112.0.1:40001", family=10)
    loop = entry("::ffff:127.0.0.1:80", "::ffff:127.0.0.1:9", family=10)
    assert wire.outer_connections([client, accepted, outer, loop]) == [outer]


def test_what_waits_for_its_time_to_run_out_is_left() -> None:
    assert wire.outer_connections([entry("10.0.2.15:1", "10.9.9.9:2", state=TIME_WAIT)]) == []


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=40)), max_size=5))
def test_messages_of_a_datagram(parts: list[tuple[int, int, bytes]]) -> None:
    data = b"".join(
        struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload + bytes(-len(payload) % 4)
        for sequence, kind, payload in parts
    )
    assert wire.messages(data) == parts


@given(st.binary(max_size=100))
def test_any_datagram_comes_to_an_end(data: bytes) -> None:
    assert len(wire.messages(data)) <= len(data) // 16


def neighbour(state: int) -> bytes:
    head = struct.pack("=BxxxiHBB", 2, 3, state, 0, 1)
    lladdr = struct.pack("=HH6sxx", 10, 2, b"\x52\x54\0\1\2\3")
    return head + lladdr + struct.pack("=HH4s", 8, 1, bytes((10, 0, 2, 2)))


def test_neighbours_that_were_learned_are_forgotten() -> None:
    wanted = struct.pack("=BxxxiHBB", 2, 3, 2, 0, 1) + struct.pack("=HH4s", 8, 1, bytes((10, 0, 2, 2)))
    assert wire.to_forget(neighbour(2)) == wanted  # NUD_REACHABLE
    assert wire.to_forget(neighbour(0x80)) == b""  # NUD_PERMANENT: configured
    assert wire.to_forget(neighbour(0x40)) == b""  # NUD_NOARP
    assert wire.to_forget(neighbour(2)[:16]) == b""


def test_the_kernels_counts() -> None:
    four = b"sockets: used 20\nTCP: inuse %d orphan 0 tw 3 alloc 4 mem 0\nUDP: inuse 1 mem 0\n"
    six = b"TCP6: inuse %d\nUDP6: inuse 3\n"
    assert [wire.sockets_in_use(text % n) for text in (four, six) for n in (0, 2)] == [False, True, False, True]
    assert wire.sockets_in_use(b"something else")
    table = b"entries  allocs   destroys\n0000001f  00000001 00000000\n0000001f  00000000 00000000\n"
    assert wire.neighbours_in_table(table) == 31


def test_a_lookout_misses_nothing(tmp_path: Path) -> None:
    def lookout(*, directories: bool) -> wire.Lookout:
        return wire.Lookout(str(tmp_path), ("a", "b"), directories=directories)

    assert not lookout(directories=False).nothing_new(), "it has just been made: not to be relied on"
    os.utime(tmp_path, (1e9, 1e9))
    files, directories = lookout(directories=False), lookout(directories=True)
    assert files.nothing_new()
    (tmp_path / "other").write_text("")
    assert not files.nothing_new()
    assert directories.nothing_new()
    (tmp_path / "a").mkdir()
    assert not directories.nothing_new()
    os.utime(tmp_path, (1e9, 1e9))
    assert not lookout(directories=False).nothing_new(), "it is there from the beginning"
    assert not wire.Lookout(str(tmp_path / "none"), (), directories=True).nothing_new()


# -- memory


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 3))
def test_touched_pages_are_found(tmp_path_factory: pytest.TempPathFactory, present: list[bool], first: int) -> None:
    """Whatever the pattern, and when it spans what is looked at in one go: the runs are the present pages."""
    flags = [False] * ((1 << 13) - 5) + present if first == 3 else present
    path: Path = tmp_path_factory.mktemp("pagemap") / "map"
    path.write_bytes(b"".join(struct.pack("=Q", (1 << 63 if flag else 1 << 55)) for flag in [False] * first + flags))
    fd = os.open(path, os.O_RDONLY)
    try:
        runs = list(wire.present_runs(fd, first * 4096, (first + len(flags)) * 4096))
    finally:
        os.close(fd)
    pages = {page for start, end in runs for page in range(start // 4096, end // 4096)}
    assert pages == {first + n for n, flag in enumerate(flags) if flag}
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs))  # none ends where the next begins
