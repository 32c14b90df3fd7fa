"""The command line: what a shell must share with the machine whose state it loads."""

import itertools
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from forkypig.model import Shape
from forkypig.qemu.command import CommandLine, DirectBoot, Hardware, Inherited

_BOOTED = CommandLine(
    qemu="qemu-system-x86_64",
    process_id="q-00000001",
    hardware=Hardware("pc-q35-7.2", "tcg", "max", "user"),
    shape=Shape(2, 512, 4096),
    disks=[(Path("/home/a,b/disks/q.qcow2"), "qcow2"), (Path("/s.qcow2"), "qcow2"), (Path("/i.raw"), "raw")],
    console=Path("/c.log"),
    memory=None,
    boot=DirectBoot(Path("/k"), Path("/i"), "console=ttyS0"),
    generation_id=uuid.UUID(int=7),
)
_SHELL = replace(_BOOTED, memory=Path("/m/s-1/memory"), boot=None)
_SOCKETS = Inherited(3, 4)


def _devices(arguments: list[str]) -> list[str]:
    return [v for k, v in itertools.pairwise(arguments) if k in ("-device", "-machine", "-cpu", "-smp", "-m")]


def test_a_shell_is_the_same_machine_to_the_last_device() -> None:
    assert _devices(_SHELL.arguments(_SOCKETS)) == _devices(_BOOTED.arguments(_SOCKETS))


def test_a_shell_waits_and_has_no_kernel() -> None:
    arguments = _SHELL.arguments(_SOCKETS)
    assert arguments[arguments.index("-incoming") + 1] == "defer"
    assert "-kernel" not in arguments
    assert "-incoming" not in _BOOTED.arguments(_SOCKETS)


def test_a_shell_maps_its_memory_privately() -> None:
    backend = next(a for a in _SHELL.arguments(_SOCKETS) if a.startswith("memory-backend-file"))
    assert "share=off" in backend
    assert "mem-path=/m/s-1/memory" in backend


def _nodes(command: CommandLine) -> list[dict[str, Any]]:
    return [json.loads(v) for k, v in itertools.pairwise(command.arguments(_SOCKETS)) if k == "-blockdev"]


def test_commas_in_paths_are_kept() -> None:
    assert "/home/a,b/disks/q.qcow2" in [node.get("filename") for node in _nodes(_BOOTED)]
    backend = replace(_SHELL, memory=Path("/m/a,b/memory")).arguments(_SOCKETS)
    assert any("mem-path=/m/a,,b/memory," in argument for argument in backend)


def test_only_the_top_of_the_disk_is_written_to() -> None:
    assert [node for node in _nodes(_SHELL) if node["driver"] != "file"] == [
        {"driver": "raw", "node-name": "disk2", "file": "file2", "read-only": True},
        {"driver": "qcow2", "node-name": "disk1", "file": "file1", "read-only": True, "backing": "disk2"},
        {"driver": "qcow2", "node-name": "disk0", "file": "file0", "discard": "unmap", "backing": "disk1"},
    ]


def test_the_sandbox_is_always_on() -> None:
    for command in (_BOOTED, _SHELL):
        arguments = command.arguments(_SOCKETS)
        assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]
        assert "-nodefaults" in arguments
