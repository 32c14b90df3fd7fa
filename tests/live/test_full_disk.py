"""A full disk: one clear sentence, nothing lost, and all is well again once there is room."""

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.live.conftest import Instance, new_instance


@pytest.fixture
def small() -> Iterator[Instance]:
    """An instance whose home is a file system of 96 MiB."""
    instance = new_instance()
    images = (instance.home / "images").readlink()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=700", "forky-test", str(instance.home)], check=True)
    try:
        (instance.home / "images").symlink_to(images)
        yield instance
        instance.ok("rm", "--all")
        instance.ok("down", "--force")
    finally:
        instance.clear()
        subprocess.run(["umount", "-R", "-l", str(instance.home)], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", str(instance.home)], check=False)


def wait_until_running(forky: Instance, deadline: float) -> None:
    while forky.json("inspect", "web")["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_fork_on_a_full_disk_fails_and_the_parent_goes_on(small: Instance) -> None:
    forky = small
    forky.ok("run", "--name", "web")
    forky.sh("web", "echo kept > /root/kept; sync")
    filler = forky.home / "filler"
    with filler.open("wb") as file:
        try:
            while file.write(b"x" * (1 << 16)):
                file.flush()
        except OSError:
            pass
    error = forky.fails("fork", "web", "-n", "2")
    assert "full" in error or "space" in error, error
    # Its own journal may have met the full disk meanwhile: then it stands still until there is room.
    assert forky.json("inspect", "web")["state"] in ("running", "paused")
    filler.unlink()
    wait_until_running(forky, time.monotonic() + 60)
    assert forky.sh("web", "cat /root/kept") == "kept"
    children = [child["name"] for child in forky.json("fork", "web", "-n", "2")["children"]]
    assert [forky.sh(name, "cat /root/kept") for name in children] == ["kept", "kept"]


def test_a_guest_that_can_not_write_waits_for_room_and_says_so(small: Instance) -> None:
    forky = small
    forky.ok("run", "--name", "web")
    forky.ok("run", "--name", "idle")
    filler = forky.home / "filler"
    free = shutil.disk_usage(forky.home).free
    filler.write_bytes(bytes(max(0, free - (8 << 20))))
    forky.sh(
        "web",
        "nohup sh -c 'dd if=/dev/urandom of=/root/big bs=1M count=16 oflag=direct; echo done > /root/done'"
        " >/dev/null 2>&1 &",
    )
    deadline = time.monotonic() + 180
    while forky.json("inspect", "web")["state"] != "paused":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "stands still" in forky.fails("exec", "web", "--", "true")
    forky.ok("rm", "idle")  # what was not full frees no more than itself, but it must go
    filler.unlink()
    wait_until_running(forky, deadline)
    while forky.sh("web", "cat /root/done 2>/dev/null || true") != "done":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert forky.sh("web", "stat -c %s /root/big") == str(16 << 20)
