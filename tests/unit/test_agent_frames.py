"""Frames and the numbering of a session: whatever is torn or lost, what comes out is what went in."""

import contextlib
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.agent import agent as wire

TYPES = st.sampled_from([wire.OPEN, wire.DATA, wire.CONTROL, wire.RESULT])
FRAMES = st.lists(st.tuples(TYPES, st.integers(0, 2**32 - 1), st.integers(1, 2**64 - 1), st.binary(max_size=300)))
NOISE = st.one_of(st.binary(max_size=60), st.just(wire.MAGIC), st.just(wire.encode(wire.ACK, 1)[:-1]))


def decode(stream: bytes, cuts: list[int]) -> list[tuple[int, int, int, bytes]]:
    decoder = wire.Decoder()
    frames = []
    positions = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(positions):
        decoder.feed(stream[start:end])
        frames += [(f.type, f.call, f.sequence, f.payload) for f in decoder.frames()]
    return frames


@given(FRAMES, st.lists(st.integers(0, 10_000), max_size=10))
def test_frames_survive_any_cutting(frames: list[tuple[int, int, int, bytes]], cuts: list[int]) -> None:
    stream = b"".join(wire.encode(t, 7, call, sequence, payload) for t, call, sequence, payload in frames)
    assert decode(stream, cuts) == frames


@given(FRAMES, NOISE)
def test_noise_before_frames_is_skipped(frames: list[tuple[int, int, int, bytes]], noise: bytes) -> None:
    # Noise that looks like the head of a long frame is only given up when enough has come to tell: so much follows.
    stream = noise + b"".join(wire.encode(t, 7, call, sequence, payload) for t, call, sequence, payload in frames)
    stream += wire.encode(wire.DATA, 7, 1, 1, bytes(wire.MAX_PAYLOAD)) * 2
    decoded = decode(stream, [])
    assert decoded[: len(frames)] == frames
    assert decoded[-1][3] == bytes(wire.MAX_PAYLOAD)


@given(FRAMES.filter(bool), st.data())
def test_a_damaged_frame_is_never_given_out(frames: list[tuple[int, int, int, bytes]], data: st.DataObject) -> None:
    stream = bytearray(b"".join(wire.encode(t, 7, call, sequence, payload) for t, call, sequence, payload in frames))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    whole = decode(bytes(stream), [])
    assert all(frame in frames for frame in whole)
    assert len(whole) < len(frames)


@given(st.binary(min_size=1, max_size=400), st.integers(1, 60_000))
def test_half_a_frame_before_a_greeting(payload: bytes, length: int) -> None:
    torn = wire.encode(wire.DATA, 1, 1, 1, bytes(length))
    decoder = wire.Decoder()
    decoder.feed(torn[: max(1, len(torn) - len(payload) - 500)])
    decoder.feed(wire.encode(wire.HELLO, 9, payload=payload))
    frames = list(decoder.frames())
    if not frames:
        assert decoder.stalled
        frame = decoder.resynchronise()
        assert frame is not None
        frames = [frame]
    assert (frames[0].type, frames[0].tag, frames[0].payload) == (wire.HELLO, 9, payload)
    assert not decoder.stalled


def test_data_that_looks_like_a_greeting_is_data() -> None:
    """A recording of our own channel that is copied through it must not be obeyed."""
    greeting = wire.encode(wire.HELLO, 9, payload=b"x")
    decoder = wire.Decoder()
    decoder.feed(wire.encode(wire.DATA, 1, 1, 1, greeting))
    assert [frame.type for frame in decoder.frames()] == [wire.DATA]


def test_waiting_is_not_spinning() -> None:
    decoder = wire.Decoder()
    decoder.feed(wire.encode(wire.DATA, 1, 1, 1, bytes(1000))[:500])
    assert not list(decoder.frames())
    assert decoder.stalled
    assert decoder.resynchronise() is None
    assert not decoder.stalled


@given(st.lists(st.tuples(st.text(), st.binary())))
def test_fields_come_back(fields: list[tuple[str, bytes]]) -> None:
    assert wire.unpack(wire.pack(*fields)) == fields


@given(st.binary(max_size=200))
def test_nonsense_fields_are_an_error_of_one_kind(payload: bytes) -> None:
    with contextlib.suppress(ValueError):  # any other error fails the test
        assert wire.pack(*wire.unpack(payload)) == payload


def test_fields_that_are_cut_off() -> None:
    whole = wire.pack(("name", b"value"), ("other", b""))
    for end in range(1, len(whole)):
        if end != len(wire.pack(("name", b"value"))):
            with pytest.raises(ValueError, match=r"cut off|no value"):
                wire.unpack(whole[:end])


@given(st.integers(1, 200), st.integers(0, 2**32), st.floats(0, 0.5))
def test_nothing_is_lost_or_doubled(count: int, seed: int, loss: float) -> None:
    """Two sessions over a channel that loses frames in both directions, and resumes now and then."""
    chance = random.Random(seed)
    sender, receiver = wire.Session(1), wire.Session(1)
    got: list[bytes] = []
    in_flight: list[bytes] = []
    decoder = wire.Decoder()

    def carry() -> None:
        for frame_bytes in in_flight:
            if chance.random() < loss:
                continue
            decoder.feed(frame_bytes)
            for frame in decoder.frames():
                if receiver.accept(frame.sequence):
                    got.append(frame.payload)
                elif receiver.gap(frame.sequence) and chance.random() >= loss:
                    sender.acknowledge(receiver.received)
        in_flight.clear()

    for i in range(count):
        in_flight.append(sender.seal(wire.DATA, 1, str(i).encode()))
        if chance.random() < 0.3:
            carry()
    loss_before = loss
    for attempt in range(200):
        sender.acknowledge(receiver.received)
        in_flight[:] = sender.replay()
        if not in_flight:
            break
        loss = 0.0 if attempt > 100 else loss_before
        carry()
    assert got == [str(i).encode() for i in range(count)]
    assert sender.unacknowledged_bytes == 0


def test_a_gap_is_told_once() -> None:
    session = wire.Session(1)
    assert session.accept(1)
    assert not session.accept(3)
    assert session.gap(3)
    assert not session.gap(4)
    assert not session.accept(1)
    assert not session.gap(1)
    assert session.accept(2)
    assert session.gap(9)
