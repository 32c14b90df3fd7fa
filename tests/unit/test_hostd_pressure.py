"""Reading how little memory there is."""

import os
from pathlib import Path

from forkypig.hostd import pressure

_PSI = "some avg10=12.50 avg60=1.00 avg300=0.10 total=3350\nfull avg10=3.25 avg60=0.50 avg300=0.05 total=2190\n"


def test_psi(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    assert pressure.stalls(file) == (0.0, 0.0)
    file.write_text(_PSI)
    assert pressure.stalls(file) == (12.5, 3.25)


def test_this_host() -> None:
    now = pressure.measure()
    assert 0 < now.available_mib < now.total_mib
    used = pressure.cpu_seconds({"self": os.getpid(), "gone": 2**22 + 1})
    assert set(used) == {"self"}
    assert used["self"] > 0


def test_a_command_with_spaces_and_brackets(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/stat").write_text(f"7 (a) b (c) S {' '.join(str(n) for n in range(4, 40))}\n")
    assert pressure.cpu_seconds({"m": 7}, tmp_path) == {"m": (14 + 15) / os.sysconf("SC_CLK_TCK")}
