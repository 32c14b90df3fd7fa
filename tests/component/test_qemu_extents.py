"""What a layer holds itself, against QEMU's own idea of the disk: random writes, zero writes and discards."""

import random
import subprocess
from pathlib import Path

import pytest

from forkypig.errors import MachineFailed
from forkypig.qemu.disks import Overlays
from forkypig.qemu.extents import Extent, own_extents, parse_map

_MIB = 1 << 20
_SIZE_MIB = 16


def _flat(layer: Path, out: Path) -> bytes:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(layer), str(out)], check=True)
    return out.read_bytes()


def _scribble(layer: Path, seed: int) -> None:
    """Fifty random operations of a guest on a disk."""
    chance = random.Random(seed)
    script = []
    for _ in range(50):
        offset, length = chance.randrange(0, 15 * _MIB, 512), chance.randrange(512, 256 << 10, 512)
        operation = chance.choice((f"write -P {chance.randrange(1, 256)}", "write -z", "write -z -u", "discard"))
        script += ["-c", f"{operation} {offset} {length}"]
    subprocess.run(["qemu-io", "-d", "unmap", "-f", "qcow2", *script, str(layer)], check=True, capture_output=True)


def _laid_over(below: bytes, layer: Path, extents: list[Extent]) -> bytes:
    disk, file = bytearray(below), layer.read_bytes()
    for extent in extents:
        end = extent.guest_offset + extent.length
        if extent.file_offset is None:
            disk[extent.guest_offset : end] = bytes(extent.length)
        else:
            data = file[extent.file_offset : extent.file_offset + extent.length]
            disk[extent.guest_offset : end] = data.ljust(extent.length, b"\0")  # a file ends at its last written byte
    return bytes(disk)


@pytest.mark.parametrize("seed", range(4))
async def test_a_layer_laid_over_what_is_below_is_the_disk(tmp_path: Path, seed: int) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(seed).randbytes(8 * _MIB))
    overlays = Overlays(tmp_path / "blanks")
    lower, upper = tmp_path / "a, lower.qcow2", tmp_path / "b.qcow2"
    await overlays.create(lower, backing=base, backing_format="raw", size_mib=_SIZE_MIB)
    _scribble(lower, seed)
    await overlays.create(upper, backing=lower, backing_format="qcow2", size_mib=_SIZE_MIB)
    _scribble(upper, seed + 100)
    disk = base.read_bytes().ljust(_SIZE_MIB * _MIB, b"\0")
    for layer in (lower, upper):
        extents = list(await own_extents(layer))
        assert extents
        assert any(extent.file_offset is None for extent in extents)
        disk = _laid_over(disk, layer, extents)
        assert disk == _flat(layer, tmp_path / "flat.raw")


async def test_an_untouched_layer_holds_nothing(tmp_path: Path) -> None:
    layer = tmp_path / "layer.qcow2"
    await Overlays(tmp_path / "blanks").create(layer, backing=tmp_path / "gone", backing_format="raw", size_mib=4096)
    assert not await own_extents(layer)


async def test_a_file_that_is_no_layer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    other.write_bytes(b"no qcow2" * 1000)
    with pytest.raises(MachineFailed, match="not in qcow2 format"):
        await own_extents(other)


def test_compressed_clusters_are_refused() -> None:
    entry = '[{"start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true}]'
    with pytest.raises(MachineFailed, match="compressed clusters at 65536"):
        parse_map(entry, Path("/layer"))
