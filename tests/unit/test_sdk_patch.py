"""Patches as git writes them: git itself takes them."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from forkypig.sdk.file_list import FileEntry
from forkypig.sdk.patch import patch

FILE = FileEntry("file", 0o644, 0, 0, 0, 0, 0)


def _of(content: bytes, mode: int = 0o644) -> tuple[FileEntry, bytes]:
    return replace(FILE, size_bytes=len(content), mode=mode), content


def _link(target: str) -> tuple[FileEntry, bytes]:
    return replace(FILE, kind="link", mode=0o777, size_bytes=len(target), target=target), target.encode()


NOTHING = (None, None)
TEXT = b"one\ntwo\nthree\n"
CHANGES = {
    "changed": (_of(TEXT), _of(TEXT.replace(b"two", b"zwei"))),
    "no newline at the end": (_of(TEXT), _of(TEXT + b"four")),
    "other ends of lines": (_of(b"a\x0cb\r\nc\x1dd\n"), _of(b"a\x0cB\r\nc\x1dd\n")),
    "new": (NOTHING, _of(TEXT, 0o755)),
    "new and empty": (NOTHING, _of(b"")),
    "gone": (_of(TEXT), NOTHING),
    "mode alone": (_of(TEXT), _of(TEXT, 0o755)),
    "mode and content": (_of(TEXT), _of(b"else\n", 0o755)),
    "link": (_link("here"), _link("there")),
    "new link": (NOTHING, _link("there")),
    "a link that was a file": (_of(TEXT), _link("there")),
}


def _put(path: Path, side: tuple[FileEntry | None, bytes | None]) -> None:
    entry, content = side
    if entry is None or content is None:
        return
    if entry.kind == "link":
        path.symlink_to(content.decode())
    else:
        path.write_bytes(content)
        path.chmod(entry.mode)


def _found(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    return (path.read_bytes(), path.stat().st_mode & 0o100) if path.exists() else None


@pytest.mark.parametrize("what", CHANGES)
def test_git_makes_the_one_of_the_other(tmp_path: Path, what: str) -> None:
    (before, old), (after, new) = CHANGES[what]
    work, expected = tmp_path / "work", tmp_path / "expected"
    for directory, side in ((work, (before, old)), (expected, (after, new))):
        directory.mkdir()
        _put(directory / "the file", side)
    text = patch("/the file", before, after, old, new)
    subprocess.run(["git", "apply", "-"], cwd=work, input=text.encode(), check=True)
    assert _found(work / "the file") == _found(expected / "the file")


def test_what_is_no_text_is_named() -> None:
    one, two = _of(b"\0one"), _of(b"\0two")
    assert patch("/f", one[0], two[0], one[1], two[1]).endswith("\nBinary files a/f and b/f differ\n")
    long = replace(FILE, size_bytes=1 << 30)
    assert "Binary files a/f and b/f differ" in patch("/f", one[0], long, one[1], None)


def test_what_git_does_not_keep_has_no_patch() -> None:
    directory = replace(FILE, kind="directory")
    assert patch("/d", None, directory, None, None) == ""
    assert patch("/f", FILE, replace(FILE, uid=7), b"", b"") == ""
