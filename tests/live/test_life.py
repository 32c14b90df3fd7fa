"""A machine's life beside forks: commands, terminals, files, stop and start, the console, and a whole restart."""

import json
import os
import pty
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.live.conftest import FORKY, Instance


@pytest.fixture(scope="module")
def box(forky: Instance) -> str:
    forky.ok("run", "--name", "box")
    return "box"


def test_exec_streams_and_passes_everything_on(forky: Instance, box: str) -> None:
    done = forky.run("exec", box, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert forky.ok("exec", box, "-i", "--", "wc", "-c", stdin=b"x" * 1_000_000).strip() == "1000000"
    assert forky.ok("exec", box, "-e", "A=b c", "-w", "/tmp", "--", "sh", "-c", "echo $A; pwd").split("\n") == [
        "b c",
        "/tmp",
        "",
    ]
    assert forky.ok("exec", box, "--user", "nobody", "--", "id", "-un").strip() == "nobody"
    assert forky.run("exec", box, "--timeout", "1", "--", "sleep", "60").returncode == 124
    assert forky.run("exec", box, "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_a_terminal_has_its_size_and_echoes(forky: Instance, box: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            FORKY,
            "exec",
            "-i",
            "-t",
            box,
            "--",
            "sh",
            "-c",
            "test -t 0 && test -t 1 && echo a-terminal; read x; echo got-$x",
        ],
        env=forky.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                return
            if not data:
                return
            seen.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + 60
    while b"a-terminal" not in seen:
        assert time.monotonic() < deadline, bytes(seen)
        time.sleep(0.05)
    os.write(ours, b"hello\n")
    assert process.wait(60) == 0
    reader.join(5)
    assert b"got-hello" in seen


def test_files_and_trees_both_ways(forky: Instance, box: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a").write_text("one")
    (tree / "sub" / "big").write_bytes(os.urandom(8 << 20))
    (tree / "sub" / "run").write_text("#!/bin/sh\n")
    (tree / "sub" / "run").chmod(0o755)
    (tree / "link").symlink_to("a")
    forky.ok("cp", str(tree), f"{box}:/root/")
    assert forky.sh(box, "cat /root/tree/link; test -x /root/tree/sub/run && echo x") == "onex"
    forky.ok("cp", f"{box}:/root/tree", str(tmp_path / "back"))
    assert (tmp_path / "back/sub/big").read_bytes() == (tree / "sub/big").read_bytes()
    assert (tmp_path / "back/link").readlink() == Path("a")
    assert "no/such" in forky.fails("cp", f"{box}:/no/such", str(tmp_path))


def test_stop_and_start_keep_the_disk(forky: Instance, box: str) -> None:
    forky.sh(box, "echo kept > /root/kept; sync")
    forky.ok("stop", box)
    assert forky.json("inspect", box)["state"] == "stopped"
    assert "forky start" in forky.fails("exec", box, "--", "true")
    assert "stopped" in forky.fails("fork", box)
    forky.ok("start", box)
    assert forky.sh(box, "cat /root/kept") == "kept"
    assert "Booting" in forky.ok("logs", box)
    child = forky.json("fork", box)["children"][0]["name"]
    assert forky.sh(child, "cat /root/kept; hostname") == f"kept\n{child}"
    forky.ok("rm", child)


def test_a_guest_that_powers_off_is_stopped(forky: Instance) -> None:
    forky.ok("run", "--name", "off")
    forky.run("exec", "off", "--", "python3", "-c", "import os; os.sync(); open('/proc/sysrq-trigger', 'w').write('o')")
    deadline = time.monotonic() + 30
    while (state := forky.json("inspect", "off")["state"]) != "stopped":
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    forky.ok("rm", "off")


def test_run_with_a_command_and_a_second_run_from_the_template(forky: Instance) -> None:
    done = forky.run("run", "--name", "once", "--rm", "--", "sh", "-c", "echo hi; exit 3")
    assert (done.returncode, done.stdout) == (3, b"hi\n")
    assert "once" not in forky.ok("ps")
    # A use begins a lease anew, and what is not used goes by itself.
    made = json.loads(forky.ok("run", "--name", "brief", "--ttl", "1m", "--json", "--", "true"))
    assert time.time_ns() // 1000 < made["expires_us"] < forky.json("inspect", "brief")["expires_us"]
    children = forky.json("fork", "brief", "-n", "2", "--ttl", "1s")["children"]
    forky.ok("renew", "brief", "--ttl", "1s")
    deadline = time.monotonic() + 20
    while gone := {"brief", *(child["name"] for child in children)} & {each["name"] for each in forky.json("ps")}:
        assert time.monotonic() < deadline, gone
        time.sleep(0.5)
    cold = forky.json("run", "--name", "cold", "--cold-boot")
    assert cold["snapshot"] is None
    forky.ok("rm", "cold")


def test_status_and_doctor_speak_json(forky: Instance, box: str) -> None:
    status = forky.json("status")
    assert all(Path(f"/proc/{status[daemon]['pid']}").exists() for daemon in ("controller", "hostd", "pager"))
    assert status["accelerator"] in ("kvm", "tcg")
    checks = json.loads(forky.run("doctor", "--json").stdout)["checks"]
    assert {"qemu", "kvm", "fuse"} <= {check["name"] for check in checks}
    assert all(check["remedy"] for check in checks if check["verdict"] != "ok")


def test_down_keeps_snapshots_and_disks(forky: Instance, box: str) -> None:
    """The memory of a tagged snapshot is written out, and can be forked after everything has ended. A machine has its
    address again, and nobody else has it."""
    address = forky.json("inspect", box)["address"]
    forky.sh(box, "mkdir -p /dev/shm && echo in-memory > /dev/shm/note; echo on-disk > /root/note; sync")
    forky.ok("snapshot", box, "--tag", "kept")
    forky.sh(box, "echo later > /dev/shm/note")
    forky.ok("down")
    assert not forky.processes()
    assert not forky.mounts()
    forky.ok("up")
    assert forky.json("inspect", box)["state"] == "stopped"
    child = forky.json("fork", "kept", "--name", "again")["children"][0]["name"]
    assert forky.sh(child, "cat /dev/shm/note /root/note") == "in-memory\non-disk"
    assert next(s for s in forky.json("snapshots") if s["tag"] == "kept")["packed"] is True
    grandchild = forky.json("fork", child)["children"][0]["name"]
    assert forky.sh(grandchild, "cat /dev/shm/note") == "in-memory"
    forky.ok("start", box)
    assert forky.sh(box, "cat /root/note") == "on-disk"
    assert forky.json("inspect", box)["address"] == address
    others = {forky.json("inspect", other)["address"] for other in (child, grandchild)}
    assert len(others - {address}) == 2 or address is None  # without root no machine has one


def test_two_instances_side_by_side(forky: Instance, box: str) -> None:
    from tests.live.conftest import new_instance

    other = new_instance()
    try:
        assert other.json("ps") == []
        assert other.pid("hostd") != forky.pid("hostd")
    finally:
        other.end()
        subprocess.run(["rm", "-rf", "--one-file-system", str(other.home)], check=False)
    assert forky.sh(box, "echo still here") == "still here"
