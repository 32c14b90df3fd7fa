"""What limits machines have by default, and that a child's are never wider than its parent's."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.core.limits_of_children import completed, tightened, usual
from forkypig.errors import InvalidRequest
from forkypig.model import Limits, Shape

LIMITS = st.builds(
    Limits,
    cpus=st.none() | st.floats(0.01, 64),
    memory_mib=st.none() | st.integers(64, 1 << 20),
    pids=st.none() | st.integers(16, 4096),
    io_mib_s=st.none() | st.integers(1, 10_000),
)
DEFAULTS = usual(Shape(), "tcg")


def test_usual_limits() -> None:
    assert usual(Shape(cpus=2, memory_mib=2048), "tcg") == Limits(
        cpus=3.0, memory_mib=2048 + 256 + 32 + 1024 + 128, pids=520, io_mib_s=None
    )
    assert usual(Shape(cpus=2, memory_mib=2048), "kvm").memory_mib == 2048 + 256 + 32


def test_what_is_asked_for_replaces_the_usual() -> None:
    asked = Limits(memory_mib=700, io_mib_s=5)
    assert completed(asked, Shape(), "kvm") == Limits(cpus=2.0, memory_mib=700, pids=516, io_mib_s=5)


def test_children_inherit() -> None:
    parent = Limits(cpus=1.5, io_mib_s=10)
    assert tightened(parent, Limits()) == parent
    assert tightened(parent, Limits(cpus=0.5, pids=100)) == Limits(cpus=0.5, pids=100, io_mib_s=10)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Limits(cpus=2.5), r"can't be given 2.5 CPUs, its parent has 2.0: use --cpu-limit 2.0 or less"),
        (Limits(memory_mib=900), r"900 MiB of memory, its parent has 800: use --memory-limit 800M or less"),
        (Limits(pids=101), r"101 threads, its parent has 100"),
        (Limits(io_mib_s=51), r"51 MiB/s of disk, its parent has 50: use --io-limit 50M or less"),
    ],
)
def test_wider_than_the_parent(asked: Limits, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        tightened(Limits(cpus=2.0, memory_mib=800, pids=100, io_mib_s=50), asked)


def test_wider_than_the_parents_default() -> None:
    with pytest.raises(InvalidRequest, match="its parent has 516"):
        tightened(Limits(), Limits(pids=517), DEFAULTS)
    assert tightened(Limits(), Limits(pids=516), DEFAULTS) == Limits(pids=516)
    assert tightened(Limits(), Limits(io_mib_s=1000), DEFAULTS).io_mib_s == 1000  # the parent's disk is not limited


@given(LIMITS, LIMITS)
def test_no_child_escapes(parent: Limits, asked: Limits) -> None:
    try:
        child = tightened(parent, asked, DEFAULTS)
    except InvalidRequest:
        return
    had, has = completed(parent, Shape(), "tcg"), completed(child, Shape(), "tcg")
    for field in fields(Limits):
        bound, value = getattr(had, field.name), getattr(has, field.name)
        assert bound is None or (value is not None and value <= bound)
