"""Admission by what is left, and quotas: the decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.core.admission import (
    BUSY_CORES,
    HostMemory,
    Level,
    check_admission,
    idle_longest,
    level,
    look,
    reckoned_mib,
)
from forkypig.core.quotas import check_quota, of_machines, of_snapshot
from forkypig.errors import ResourceExhausted
from forkypig.model import Shape
from forkypig.model.tenants import Quota, Tenant, Usage


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (HostMemory(), Level.CALM),  # not known
        (HostMemory(16_384, 8_000), Level.CALM),
        (HostMemory(16_384, 900), Level.TIGHT),
        (HostMemory(16_384, 500), Level.PRESSED),
        (HostMemory(16_384, 8_000, some_percent=12), Level.TIGHT),
        (HostMemory(16_384, 8_000, some_percent=12, full_percent=6), Level.PRESSED),
        (HostMemory(2_048, 600), Level.CALM),  # a small host keeps 256 MiB
    ],
)
def test_levels(memory: HostMemory, expected: Level) -> None:
    assert level(memory) is expected


def test_what_machines_are_reckoned_at() -> None:
    assert reckoned_mib(Shape(memory_mib=512), 10, 16.0) == 320
    assert reckoned_mib(Shape(memory_mib=8192), 1, 16.0) == 512
    assert reckoned_mib(Shape(memory_mib=512), 1, 16.0, boots=True) == 192
    assert reckoned_mib(Shape(memory_mib=128), 1, 16.0, boots=True) == 128
    assert reckoned_mib(Shape(memory_mib=8192), 2, 1.0) == 16_384


@given(st.integers(1, 1 << 20), st.lists(st.tuples(st.integers(128, 65_536), st.integers(1, 100)), max_size=50))
def test_what_is_admitted_is_never_more_than_there_is(available: int, asked: list[tuple[int, int]]) -> None:
    memory = HostMemory(1 << 20, available)
    promised = 0
    for memory_mib, count in asked:
        needed = reckoned_mib(Shape(memory_mib=memory_mib), count, 16.0)
        try:
            check_admission(memory, promised, needed)
        except ResourceExhausted:
            continue
        promised += needed
    assert promised <= max(available - memory.reserve_mib, 0)


def test_a_refusal_says_what_there_is_and_what_to_do() -> None:
    with pytest.raises(ResourceExhausted, match=r"room for 88 MiB more .* reckoned to need 320: .* FORKY_OVERCOMMIT"):
        check_admission(HostMemory(16_384, 700), 100, 320)
    with pytest.raises(ResourceExhausted, match="short of memory"):
        check_admission(HostMemory(16_384, 400), 0, 0)


def test_who_is_idle() -> None:
    seen = look({}, {"busy": 10.0, "idle": 10.0, "idler": 5.0}, 0.0)
    for now in (10.0, 20.0):
        used = {"busy": 10.0 + now, "idle": 10.0 + now * BUSY_CORES / 2, "idler": 5.0}
        if now > 10.0:
            used["new"] = 0.0
        seen = look(seen, used, now)
    assert set(idle_longest(seen, ["busy", "idle", "idler", "new", "gone"], 20.0, 15.0)) == {"idle", "idler"}
    assert idle_longest(seen, ["idle"], 20.0, 25.0) == []
    # A QEMU that is another one now (after a fork) has used less: it counts as busy.
    assert idle_longest(look(seen, {"idle": 0.1}, 30.0), ["idle"], 30.0, 5.0) == []


def test_a_quota_stops_only_what_it_is_about() -> None:
    tenant = Tenant(name="red", quota=Quota(machines=2, memory_mib=0))
    check_quota(tenant, Usage(machines=5), Usage(snapshots=1))
    check_quota(tenant, Usage(), Usage(machines=2))
    with pytest.raises(ResourceExhausted, match="quota of 2 machines, uses 1 and would need 2 more"):
        check_quota(tenant, Usage(machines=1), of_machines(Shape(), 2))
    with pytest.raises(ResourceExhausted, match="0 MiB of memory"):
        check_quota(tenant, Usage(), of_machines(Shape(), 1))
    check_quota(Tenant(name="red", quota=Quota(disk_mib=10)), Usage(disk_mib=9), of_snapshot())
    with pytest.raises(ResourceExhausted, match="10 MiB of disk"):
        check_quota(Tenant(name="red", quota=Quota(disk_mib=10)), Usage(disk_mib=10), of_snapshot())
