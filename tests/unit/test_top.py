"""forky top's table: what it shows where a terminal is narrow."""

import io

from rich.console import Console

from forkypig.cli.observing import _Gauge
from forkypig.model import ImageId, Machine, MachineId, MachineState, Shape
from forkypig.sdk.observe import MachineUse, Usage

USE = MachineUse(
    machine=Machine(
        id=MachineId("m-1"), name="web-15", state=MachineState.RUNNING, image=ImageId("i-1"), shape=Shape()
    ),
    pool="",
    last_pause_ms=15.0,
    cpu_s=1.0,
    cpu_time_us=1,
    resident_bytes=200 << 20,
    proportional_bytes=70 << 20,
    private_bytes=60 << 20,
    shared_bytes=140 << 20,
)


def drawn(width: int) -> list[str]:
    gauge = _Gauge("cpu")
    gauge.take(Usage((USE,), 0, 0.0, 0.0, 0, 0, ""))
    console = Console(file=io.StringIO(), width=width)
    console.print(gauge.table(width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_narrow_terminal_has_fewer_columns_and_a_line_a_machine() -> None:
    assert drawn(100)[0].split() == ["NAME", "STATE", "CPU", "%", "OWN", "SHARED", "PSS", "RSS", "LAST", "PAUSE"]
    assert drawn(40)[0].split() == ["NAME", "CPU", "%", "OWN", "PSS"]
    assert drawn(14)[0].split() == ["NAME", "CPU", "%"]
    assert all(len(drawn(width)) == 2 for width in range(14, 100))
