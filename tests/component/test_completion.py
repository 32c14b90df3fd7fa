"""Completion, by driving a real bash; and the file with names that it reads."""

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from forkypig.daemon.settings import Settings
from forkypig.v1 import controller_pb2 as pb
from tests.component.controller_rig import Client, eventually, home, running_host, serving

Complete = Callable[..., list[str]]


@pytest.fixture(scope="module")
def written() -> str:
    """The script."""
    words = [sys.executable, "-m", "forkypig.cli.main", "completion", "bash"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def complete(tmp_path: Path, written: str) -> Complete:
    """What bash offers for words, of which the last is being written."""
    script = tmp_path / "completion.bash"
    script.write_text(written)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/names").write_text(
        "machine web\nmachine web-1\nmachine db\nsnapshot works\nimage debian-12\npool py\ntenant red\n"
    )

    def ask(*words: str, home: Path = tmp_path) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("forky", *words))
        asking = (
            f'source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _forky; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", asking],
            capture_output=True,
            text=True,
            check=True,
            env={"FORKY_HOME": str(home), "PATH": "/usr/bin:/bin"},
            cwd=tmp_path,
            timeout=30,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fo"], ["fork"]),
        (["image", "l"], ["ls"]),
        (["auth", "token", "cr"], ["create"]),
        (["auth", "tok"], ["token"]),
        (["fork", ""], ["web", "web-1", "db", "works"]),
        (["fork", "we"], ["web", "web-1"]),
        (["fork", "web", ""], []),
        (["fork", "-n", ""], []),  # a number
        (["fork", "-n", "3", "d"], ["db"]),
        (["fork", "--qu"], ["--quiesce"]),
        (["pause", "w"], ["web", "web-1"]),
        (["rm", "web", "web-1", "wo"], ["works"]),
        (["restore", "web", ""], ["works"]),
        (["run", "--from", ""], ["works"]),
        (["run", "deb"], ["debian-12"]),
        (["exec", "web", "--", "w"], []),
        (["cp", "we"], ["web:", "web-1:"]),
        (["export", "works", "comp"], ["completion.bash"]),
        (["config", "get", "pack_a"], ["pack_after_s"]),
        (["acquire", ""], ["py"]),
        (["share", "works", "--with", ""], ["red"]),
        (["auth", "token", "create", "--role", "u"], ["user"]),
        (["run", "--from", "="], ["works"]),  # how bash takes --from=
        (["run", "--from", "=", "wo"], ["works"]),
        (["run", "--from", "=", "works", "deb"], ["debian-12"]),
        (["run", "--from=wo"], ["--from=works"]),  # and zsh
        (["nonsense", ""], []),
        (["fork", "x$(touch", ""], []),
    ],
)
async def test_bash(complete: Complete, words: list[str], offered: list[str]) -> None:
    assert complete(*words) == offered


async def test_silent_without_a_controller(complete: Complete, tmp_path: Path) -> None:
    assert complete("fork", "w", home=tmp_path / "nothing") == []
    assert "fork" in complete("", home=tmp_path / "nothing")


async def test_no_python_at_a_key_press(complete: Complete, tmp_path: Path) -> None:
    """A thousand machines, and a PATH without Python."""
    (tmp_path / "run/names").write_text("".join(f"machine web-{n}\n" for n in range(1000)))
    began = time.monotonic()
    assert len(complete("exec", "web-1")) == 111
    print(f"bash offered 111 of 1000 names in {(time.monotonic() - began) * 1000:.0f} ms")


@pytest.fixture
def settings() -> Any:
    with home() as made:
        yield made


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with running_host(settings), serving(settings) as made:
        yield made


async def test_the_controller_keeps_the_names(client: Client, settings: Settings) -> None:
    async def names(*wanted: str) -> bool:
        there = settings.names_file.read_text().splitlines() if settings.names_file.exists() else []
        return {line for line in there if not line.startswith(("image", "tenant"))} == set(wanted)

    await client.run("web")
    await eventually(lambda: names("machine web"))
    await client.fork("web", 2)
    await client.call("TakeSnapshot", pb.TakeSnapshotRequest(machine="web", tag="works"))
    await eventually(lambda: names("machine web", "machine web-1", "machine web-2", "snapshot works"))
    await client.machine("RemoveMachine", "web-1")
    await eventually(lambda: names("machine web", "machine web-2", "snapshot works"))
    assert settings.names_file.stat().st_mode & 0o777 == 0o600
