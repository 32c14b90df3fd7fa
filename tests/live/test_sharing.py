"""A snapshot leaves one home and goes on in another: as a file, signed, and by a directory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import Instance, new_instance

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def other() -> Iterator[Instance]:
    """A second home, without an image."""
    instance = new_instance()
    images = instance.home / "images"
    images.unlink()
    images.mkdir()
    try:
        yield instance
    finally:
        instance.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


def packs_bytes(instance: Instance) -> int:
    return sum(path.stat().st_size for path in (instance.home / "store" / "packs").glob("*.pack"))


def test_a_snapshot_goes_on_in_another_home(forky: Instance, other: Instance, tmp_path: Path) -> None:
    file, key, place = tmp_path / "light", tmp_path / "key", (tmp_path / "remote").as_uri()
    forky.ok("run", "--name", "web", "--memory", "256M")
    forky.sh("web", "echo on disk > /root/file; echo in memory > /dev/shm/file; sync")
    forky.ok("snapshot", "web", "--tag", "light", "--message", "first light")
    forky.ok("key", "create", str(key))
    exported = forky.json("export", "light", str(file), "--sign", str(key))
    assert exported["bytes"] == file.stat().st_size and exported["signed"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]

    arrived = other.json("import", str(file), "--trust", f"{key}.pub", "--tag", "dawn")
    assert arrived["snapshot"]["tag"] == "dawn" and arrived["snapshot"]["message"] == "first light"
    assert "is here already, as dawn" in other.ok("import", str(file))
    other.ok("fork", "dawn", "-n", "1", "--name", "child")
    assert other.sh("child-1", "cat /root/file /dev/shm/file; hostname") == "on disk\nin memory\nchild-1"

    # What is pushed from there is what was kept here, and a later one sends its changes alone.
    assert not other.json("push", "dawn", place)["was_there"]
    other.sh("child-1", "echo more > /root/more; sync")
    other.ok("snapshot", "child-1", "--tag", "noon")
    sent = other.json("push", "noon", place)["new_bytes"]
    assert sent < exported["bytes"] / 3
    listed = forky.json("pull", place)
    assert [(each["tag"], each["is_here"]) for each in listed] == [("dawn", True), ("noon", False)]
    pulled = forky.json("pull", f"{place}/noon")["snapshot"]
    assert pulled["parent"] == listed[0]["id"] == arrived["snapshot"]["id"]

    # Removed there: its chunks are collected, and what stays is whole.
    other.ok("rm", "child-1", "noon")
    before = packs_bytes(other)
    assert other.json("gc")["freed_bytes"] == before - packs_bytes(other) > 0
    assert "all is well" in other.ok("fsck")

    # Damage is named, for whom it matters.
    victim = max((other.home / "store" / "packs").glob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 1
    victim.write_bytes(content)
    found = other.run("fsck", "--deep")
    assert found.returncode == 1 and listed[0]["id"] in found.stdout.decode()
