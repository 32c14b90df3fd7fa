"""Overlays are real qcow2 files over what they were told to stand on; checked with QEMU's own tool."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from forkypig.errors import InvalidRequest
from forkypig.qemu import disks
from forkypig.qemu.disks import Overlays


def _info(path: Path) -> dict[str, object]:
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    out = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True).stdout
    return dict(json.loads(out))


async def test_overlays_over_overlays(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * 256 * 1024)
    overlays = Overlays(tmp_path / "blanks")
    first, second = tmp_path / "first.qcow2", tmp_path / ("a-longer-name-" * 10 + ".qcow2")
    await overlays.create(first, backing=base, backing_format="raw", size_mib=64)
    await overlays.create(second, backing=first, backing_format="qcow2", size_mib=64)
    assert _info(first)["backing-filename"] == str(base)
    assert _info(first)["backing-filename-format"] == "raw"
    assert _info(second)["backing-filename"] == str(first)
    assert _info(second)["virtual-size"] == 64 << 20
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(second)], check=True, capture_output=True)
    flat = tmp_path / "flat.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(second), str(flat)], check=True)
    data = flat.read_bytes()
    assert data[: 1 << 20] == base.read_bytes()
    assert data[1 << 20 : (1 << 20) + (64 << 10)] == b"\7" * (64 << 10)
    assert not any(data[(1 << 20) + (64 << 10) :])


async def test_a_name_that_the_format_can_not_hold(tmp_path: Path) -> None:
    overlays = Overlays(tmp_path / "blanks")
    with pytest.raises(InvalidRequest, match="shorter FORKY_HOME"):
        await overlays.create(tmp_path / "o.qcow2", backing=Path("/" + "x" * 1100), backing_format="raw", size_mib=1)
    assert not (tmp_path / "o.qcow2").exists()


@pytest.mark.parametrize(
    ("syncs_s", "made", "calm"),
    [
        pytest.param([0.0], 1, True, id="calm"),
        pytest.param([0.02, 0.02, 0.0, 0.0], 3, True, id="a burst of somebody else's"),
        pytest.param([0.02] * 20, 8, False, id="a slow disk"),
        pytest.param([1.1] * 20, 1, False, id="a disk that hangs"),
    ],
)
def test_writing_back_waits_for_a_calm_moment_and_not_for_ever(
    syncs_s: list[float], made: int, calm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, now_s = iter(syncs_s), 0.0

    def sync(_: int) -> None:
        nonlocal now_s
        now_s += next(left)

    monkeypatch.setattr(disks, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(os, "fdatasync", sync)
    file = tmp_path / "disk"
    file.touch()
    took_s = disks.write_back(file)
    assert len(list(left)) == len(syncs_s) - made
    assert (took_s < 0.005) == calm
