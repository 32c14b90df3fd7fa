"""What people type: sizes, copies' ends, and commands after «--»."""

from collections import Counter

import pytest
import typer
from typer.main import get_command

from forkypig.cli import sizes
from forkypig.cli.arguments import assignments, split_command
from forkypig.cli.copying import place
from forkypig.cli.main import app
from forkypig.cli.topics import TOPICS


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("512M", 512),
        ("4G", 4096),
        ("1.5G", 1536),
        ("0.5g", 512),
        ("1T", 1 << 20),
        ("2GiB", 2048),
        ("1", 1),
    ],
)
def test_sizes(text: str, mib: int) -> None:
    assert sizes.mib(text) == mib


@pytest.mark.parametrize(
    "text",
    ["", "0", "0G", "-1", "1.5", "0.3M", "G", "4X", "4 G G", "1e3", "0x10", "1,5G", "99999T", "NaN", "inf", "4K", "٣"],
)
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="«"):
        sizes.mib(text)


@pytest.mark.parametrize("mib", [1, 512, 1024, 1536, 4096, 4097])
def test_sizes_are_written_as_they_are_read(mib: int) -> None:
    assert sizes.mib(sizes.human_mib(mib)) == mib


@pytest.mark.parametrize(
    ("text", "machine", "path"),
    [
        ("web:/etc", "web", "/etc"),
        ("web:/a:b", "web", "/a:b"),
        ("./a:b", None, "./a:b"),
        ("/a:b", None, "/a:b"),
        ("file", None, "file"),
        ("-", None, "-"),
        (":x", None, ":x"),
    ],
)
def test_ends_of_a_copy(text: str, machine: str | None, path: str) -> None:
    assert place(text) == (machine, path)


def test_what_follows_the_dashes_is_the_guests() -> None:
    assert split_command(["run", "--name", "a", "--", "ls", "--", "-l"]) == (["run", "--name", "a"], ["ls", "--", "-l"])
    assert split_command(["exec", "web", "ls"]) == (["exec", "web", "ls"], None)
    assert split_command(["run", "--"]) == (["run"], [])
    assert split_command(["rm", "--", "-x"]) == (["rm", "--", "-x"], None)
    assert split_command([]) == ([], None)


def test_assignments() -> None:
    assert assignments(["A=1", "B=", "C=x=y"]) == {"A": "1", "B": "", "C": "x=y"}
    for wrong in ("A", "=1", ""):
        with pytest.raises(typer.BadParameter):
            assignments([wrong])


def test_every_command_stands_once_in_the_help() -> None:
    topics = Counter(name for names in TOPICS.values() for name in names)
    assert topics == Counter(dict.fromkeys(get_command(app).commands, 1))  # type: ignore[attr-defined]
