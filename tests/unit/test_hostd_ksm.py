"""KSM's switch, on files that stand for the kernel's."""

from pathlib import Path

import pytest

from forkypig.errors import NotPossibleNow
from forkypig.hostd.ksm import Ksm

_BEFORE = {"run": "0", "pages_to_scan": "100", "sleep_millisecs": "20"}


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    directory = tmp_path / "ksm"
    directory.mkdir()
    for name, value in (_BEFORE | {"general_profit": "-4096", "full_scans": "3"}).items():
        (directory / name).write_text(f"{value}\n")
    return directory


def _set(kernel: Path) -> dict[str, str]:
    return {name: (kernel / name).read_text().strip() for name in _BEFORE}


async def test_on_and_off_leaves_the_kernel_as_it_was(kernel: Path, tmp_path: Path) -> None:
    state = tmp_path / "ksm.json"
    ksm = Ksm(state, kernel)
    await ksm.set(["red"], [])
    assert _set(kernel) == {"run": "1", "pages_to_scan": "1000", "sleep_millisecs": "50"}
    assert (ksm.is_on("red"), ksm.is_on("blue")) == (True, False)

    # hostd dies: the next one knows who is on, and what was before.
    again = Ksm(state, kernel)
    again.begin()
    assert again.is_on("red")
    assert again.saving([]).profit_bytes == -4096
    await again.set(["red", "blue"], [])
    await again.set([], [])
    assert _set(kernel) == _BEFORE
    assert not state.exists()


async def test_down_puts_the_kernel_back_and_up_sets_it_again(kernel: Path, tmp_path: Path) -> None:
    ksm = Ksm(tmp_path / "ksm.json", kernel)
    await ksm.set(["red"], [])
    ksm.put_back()
    assert _set(kernel) == _BEFORE
    again = Ksm(tmp_path / "ksm.json", kernel)
    assert again.is_on("red")
    again.begin()
    assert _set(kernel)["run"] == "1"


async def test_what_somebody_else_has_running_keeps_their_settings(kernel: Path, tmp_path: Path) -> None:
    (kernel / "run").write_text("1\n")
    ksm = Ksm(tmp_path / "ksm.json", kernel)
    await ksm.set(["red"], [])
    assert _set(kernel) == _BEFORE | {"run": "1"}
    await ksm.set([], [])
    assert _set(kernel) == _BEFORE | {"run": "1"}


async def test_a_kernel_without_it(tmp_path: Path) -> None:
    ksm = Ksm(tmp_path / "ksm.json", tmp_path / "none")
    with pytest.raises(NotPossibleNow, match="a kernel that has it"):
        await ksm.set(["red"], [])
    assert not ksm.is_on("red")
    assert ksm.saving([1]).merged_bytes >= 0
