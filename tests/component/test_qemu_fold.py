"""Folding in a real QEMU without a machine: the disk reads the same, nothing of the old chain stays open."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forkypig.errors import MachineFailed
from forkypig.qemu import nodes
from forkypig.qemu.disks import Overlays
from forkypig.qemu.fold import fold
from forkypig.qemu.process import Process

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU")

_MIB = 1 << 20
_SIZE_MIB = 32


class Chain:
    """A base of random bytes, three overlays over it with writes of their own, and what lies below the top as one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "base.raw"
        self.layers = [directory / f"{name}.qcow2" for name in ("top", "middle", "bottom")]
        self.flat = directory / "flat.raw"

    async def make(self) -> None:
        self.base.write_bytes(random.Random(1).randbytes(8 * _MIB))
        overlays, below, driver = Overlays(self.directory / "blanks"), self.base, "raw"
        for position, layer in enumerate(reversed(self.layers)):
            await overlays.create(layer, backing=below, backing_format=driver, size_mib=_SIZE_MIB)
            write = f"write -P {position + 1} {position + 1}M 1M"
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(layer)], check=True, capture_output=True)
            below, driver = layer, "qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.layers[1]), str(self.flat)], check=True)

    @property
    def long(self) -> list[tuple[Path, str]]:
        return [*((layer, "qcow2") for layer in self.layers), (self.base, "raw")]

    @property
    def folded(self) -> list[tuple[Path, str]]:
        return [(self.layers[0], "qcow2"), (self.flat, "raw")]


@contextlib.asynccontextmanager
async def _qemu(directory: Path, chain: list[tuple[Path, str]]) -> AsyncIterator[Process]:
    """A QEMU without a machine whose disk is `chain`."""
    arguments = []
    for depth in reversed(range(len(chain))):
        path, driver = chain[depth]
        below = str(depth + 1) if depth + 1 < len(chain) else None
        for options in (nodes.file_node(str(depth), path, "threads"), nodes.format_node(str(depth), driver, below)):
            arguments += ["-blockdev", json.dumps(options)]
    with socket.socket(socket.AF_UNIX) as listening:  # made here, so that it listens before anybody connects
        listening.bind(str(directory / "qmp.sock"))
        listening.listen()
        qmp = ["-chardev", f"socket,id=qmp,fd={listening.fileno()},server=on,wait=off", "-mon", "qmp,mode=control"]
        started = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", *qmp, *arguments),
            pass_fds=[listening.fileno()],
        )
    try:
        process = await Process.adopt(directory, "q-1", started.pid, connect=True)
        yield process
        await process.session.close()
        process.release()
    finally:
        started.kill()
        await started.wait()


async def _io(process: Process, command: str) -> str:
    line = f'qemu-io disk0 "{command}"'
    return str(await process.session.execute("human-monitor-command", {"command-line": line}))


async def _check(process: Process) -> None:
    """The disk reads as the chain was written."""
    for pattern in (1, 2, 3):
        assert "failed" not in await _io(process, f"read -P {pattern} {pattern}M 1M")


async def _open_files(process: Process) -> set[str]:
    found: list[Any] = await process.session.execute("query-named-block-nodes", {"flat": True})
    named = {node["image"]["filename"] for node in found if node["drv"] == "file"}
    descriptors = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
    assert {d for d in descriptors if d.endswith((".qcow2", ".raw"))} == named
    return named


@pytest.fixture
async def chain(tmp_path: Path) -> Chain:
    made = Chain(tmp_path)
    await made.make()
    return made


async def test_all_below_the_overlay_becomes_one_file_while_something_writes(chain: Chain, tmp_path: Path) -> None:
    async with asyncio.timeout(60), _qemu(tmp_path, chain.long) as process:
        assert len(await _open_files(process)) == 4
        # aio_write returns at once: the requests are under way while the overlay is opened again.
        for position in range(64):
            await _io(process, f"aio_write -q -P 9 {10 * _MIB + position * 128 * 1024} 96k")
        assert await fold(process, chain.folded)
        assert await _open_files(process) == {str(chain.layers[0]), str(chain.flat)}
        await _io(process, "aio_flush")
        await _check(process)
        for position in range(64):
            assert "failed" not in await _io(process, f"read -P 9 {10 * _MIB + position * 128 * 1024} 96k")
        assert not await fold(process, chain.folded), "the same again"


async def test_layers_above_the_fold_stay(chain: Chain, tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(chain.layers[2]), str(chain.flat)], check=True)
    async with asyncio.timeout(60), _qemu(tmp_path, chain.long) as process:
        assert await fold(process, [*chain.long[:2], (chain.flat, "raw")])
        await _check(process)
        assert await _open_files(process) == {str(chain.layers[0]), str(chain.layers[1]), str(chain.flat)}


async def test_one_fold_after_another(chain: Chain, tmp_path: Path) -> None:
    lower = tmp_path / "lower.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(chain.layers[2]), str(lower)], check=True)
    async with asyncio.timeout(60), _qemu(tmp_path, chain.long) as process:
        assert await fold(process, [*chain.long[:2], (lower, "raw")])
        assert await fold(process, chain.folded)
        await _check(process)
        assert await _open_files(process) == {str(chain.layers[0]), str(chain.flat)}
        assert process.disks == chain.folded


async def test_the_base_is_opened_anew(chain: Chain, tmp_path: Path) -> None:
    async with asyncio.timeout(60), _qemu(tmp_path, chain.folded) as process:
        other = tmp_path / "other.raw"
        shutil.copy(chain.flat, other)
        other.replace(chain.flat)  # as after a new mount: the same path is another file
        assert await fold(process, chain.folded, anew=True)
        await _check(process)
        assert await _open_files(process) == {str(chain.layers[0]), str(chain.flat)}


async def test_a_fold_that_fails_changes_nothing(chain: Chain, tmp_path: Path) -> None:
    async with asyncio.timeout(60), _qemu(tmp_path, chain.long) as process:
        before = await process.session.execute("query-named-block-nodes", {"flat": True})
        with pytest.raises(MachineFailed, match="blockdev-add"):
            await fold(process, [chain.folded[0], (tmp_path / "gone.raw", "raw")])
        with pytest.raises(MachineFailed, match="stands on another disk"):
            await fold(process, [(tmp_path / "strange.qcow2", "qcow2"), chain.folded[1]])
        assert await process.session.execute("query-named-block-nodes", {"flat": True}) == before
        await _check(process)
