"""The meter of machines' CPU and memory, on a made-up /proc; and where metrics may be served."""

from pathlib import Path

from forkypig.hostd.usage import Meter, Target, parse_rollup
from forkypig.model import MachineId

ROLLUP = """55d0c0a5e000-7ffe5d5f2000 ---p 00000000 00:00 0                          [rollup]
Rss:              150000 kB
Pss:               60000 kB
Pss_Anon:          50000 kB
Shared_Clean:      90000 kB
Shared_Dirty:       5000 kB
Private_Clean:      5000 kB
Private_Dirty:     50000 kB
Locked:                0 kB
"""
WEB = MachineId("m-000000000001")


def process(proc: Path, pid: int, ticks: int, rollup: str = ROLLUP) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "stat").write_text(f"{pid} (qemu) x) y) S 1 1 1 0 -1 0 0 0 0 0 {ticks} {ticks} 0 0 20 0 4 0 1")
    (proc / str(pid) / "smaps_rollup").write_text(rollup)


def test_rollup() -> None:
    found = parse_rollup(ROLLUP)
    kib = [found.resident >> 10, found.proportional >> 10, found.private >> 10, found.shared >> 10]
    assert kib == [150000, 60000, 55000, 95000]


async def test_cpu_at_each_look_and_memory_seldom(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    process(tmp_path, 7, ticks=50)
    first = (await meter.read([Target(WEB, 7, False)]))[WEB]
    assert first.cpu_us == 1_000_000
    process(tmp_path, 7, ticks=100, rollup=ROLLUP.replace("60000", "70000"))
    second = (await meter.read([Target(WEB, 7, False)]))[WEB]
    assert (second.cpu_us, second.memory) == (2_000_000, first.memory)
    assert await meter.read([Target(WEB, 8, False)]) == {}  # it has ended
    meter.close()


async def test_a_successor_is_read_anew_and_a_split_is_not_disturbed(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    process(tmp_path, 7, ticks=50)
    busy = (await meter.read([Target(WEB, 7, True)]))[WEB]
    assert (busy.cpu_us, busy.memory.time_us) == (1_000_000, 0)
    await meter.read([Target(WEB, 7, False)])
    process(tmp_path, 9, ticks=1, rollup=ROLLUP.replace("60000", "70000"))
    successor = (await meter.read([Target(WEB, 9, False)]))[WEB]
    assert successor.memory.proportional == 70000 << 10
    meter.close()
