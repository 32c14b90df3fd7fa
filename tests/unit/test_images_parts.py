"""The parts of a build that need no packages: sources, the initramfs, the kernel file, progress, commands."""

import asyncio
import lzma
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from forkypig.errors import DeadlineExceeded, InternalError, NotPossibleNow, ResourceExhausted
from forkypig.images import recipe
from forkypig.images.apt import sources_from
from forkypig.images.commands import run
from forkypig.images.initramfs import build_initramfs
from forkypig.images.kernel import BOOT_MODULES, inflate, write_sparse
from forkypig.images.steps import TOTAL, Steps
from forkypig.model import Progress


def test_a_debian_12_hosts_own_mirror_is_used() -> None:
    targets = (
        "Debian|bookworm|http://mirror.example/debian/|bookworm|main|/usr/share/keyrings/own.gpg\n"
        "Debian|bookworm|http://mirror.example/debian/|bookworm|contrib|/usr/share/keyrings/own.gpg\n"
        "Debian|bookworm-security|http://mirror.example/sec/|bookworm-security|main|$(SIGNED_BY)\n"
        "Node Source|nodistro|http://node.example/|nodistro|main|$(SIGNED_BY)\n"
        "Debian Backports|bookworm-backports|http://mirror.example/debian/|bookworm-backports|main|$(SIGNED_BY)\n"
    )
    assert sources_from(targets) == [
        "deb [signed-by=/usr/share/keyrings/own.gpg] http://mirror.example/debian/ bookworm main",
        f"deb [signed-by={recipe.KEYRING}] http://mirror.example/sec/ bookworm-security main",
    ]


def test_another_systems_sources_are_not_used() -> None:
    assert sources_from("") == []
    assert sources_from("Ubuntu|noble|http://mirror.example/ubuntu/|noble|main|$(SIGNED_BY)\n") == []
    assert sources_from("Debian|trixie|http://mirror.example/debian/|trixie|main|$(SIGNED_BY)\n") == []
    # Updates without the suite itself would install nothing.
    assert sources_from("Debian|bookworm-updates|http://x.example/|bookworm-updates|main|$(SIGNED_BY)\n") == []


def test_the_recipe_stands_for_the_agent_too() -> None:
    assert recipe.digest(b"one") == recipe.digest(b"one") != recipe.digest(b"two")


def test_the_initramfs_is_an_archive_that_cpio_reads(tmp_path: Path) -> None:
    modules = {"virtio": b"V" * 5, "ext4": b"E" * 4096}
    archive = build_initramfs(b"busybox!", modules, ["/sbin/init", "--init"])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/busybox").read_bytes() == b"busybox!"
    assert (tmp_path / "bin/busybox").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert {path.stem: path.read_bytes() for path in (tmp_path / "modules").iterdir()} == modules
    script = (tmp_path / "init").read_text()
    assert "for module in virtio ext4;" in script
    assert "exec switch_root /root /sbin/init --init <" in script
    subprocess.run(["sh", "-n", str(tmp_path / "init")], check=True)
    assert archive == build_initramfs(b"busybox!", modules, ["/sbin/init", "--init"])


def test_every_boot_module_comes_after_the_ones_it_needs() -> None:
    order = {name: place for place, name in enumerate(BOOT_MODULES)}
    for name, needed in (
        ("virtio_pci", "virtio_pci_modern_dev"),
        ("virtio_pci", "virtio_pci_legacy_dev"),
        ("virtio", "virtio_ring"),
        ("virtio_blk", "virtio"),
        ("virtio_net", "net_failover"),
        ("net_failover", "failover"),
        ("ext4", "jbd2"),
        ("ext4", "mbcache"),
        ("ext4", "crc16"),
        ("ext4", "crc32c_generic"),
    ):
        assert order[needed] < order[name]


def bzimage(payload: bytes, setup_sectors: int = 3) -> bytes:
    header = bytearray(0x260)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 32, len(payload))
    return bytes(header).ljust((setup_sectors + 1) * 512, b"\0") + bytes(32) + payload + b"behind"


def test_the_kernel_is_inflated_out_of_a_bzimage() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 64
    payload = lzma.compress(elf, lzma.FORMAT_XZ) + struct.pack("<I", len(elf))
    assert inflate(bzimage(payload)) == elf
    old = bytearray(bzimage(payload, 4))
    old[0x1F1] = 0  # means 4
    assert inflate(bytes(old)) == elf


@pytest.mark.parametrize(
    "vmlinuz",
    [
        b"",
        bytes(4096),
        bzimage(b"\x1f\x8b gzip"),
        bzimage(b"\xfd7zXZ\0 broken stream"),
        bzimage(lzma.compress(b"no ELF")),
    ],
)
def test_another_kind_of_kernel_is_a_clear_error(vmlinuz: bytes) -> None:
    with pytest.raises(InternalError, match="kernel"):
        inflate(vmlinuz)


def test_zeros_of_a_sparse_file_take_no_room(tmp_path: Path) -> None:
    content = b"a" * 5000 + bytes(1 << 20) + b"b" * 10 + bytes(1 << 20)
    write_sparse(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "file").stat().st_blocks * 512 <= 64 << 10


def test_progress_only_grows_and_reaches_the_end() -> None:
    seen: list[Progress] = []
    steps = Steps(seen.append)
    for line in (
        *(
            "I: running apt-get update...",
            "Get:1 x",
            "I: downloading packages with apt...",
            "I: extracting archives...",
        ),
        *("I: installing essential packages...", *["Unpacking a"] * 400, "Setting up a (1) ..."),
        *("I: installing remaining packages inside the chroot...", *["Setting up b (1) ..."] * 400),
    ):
        steps.on_line(line)
    for step in ("downloading the kernel", "unpacking the kernel", "finishing the files", "making the disk"):
        steps.reach(step)
    steps.reach("checking")
    steps.reach("done")
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == TOTAL
    assert {progress.total for progress in seen} == {TOTAL}
    assert len(seen) < 100  # not one for every line
    assert next(p for p in seen if p.done == 75).step == "installing packages"


async def test_a_command_gives_its_output_and_its_lines() -> None:
    lines: list[str] = []
    output = await run("x", ["cat"], deadline_s=10, on_line=lines.append, stdin=b"one\n10%\r20%\rtwo\n")
    assert output == "one\ntwo"
    assert lines == ["one", "two"]


async def test_a_command_that_fails_shows_its_last_words() -> None:
    with pytest.raises(NotPossibleNow, match=r"packages: ls ended with 2.*\n.*/nowhere"):
        await run("packages", ["ls", "/nowhere"], deadline_s=10)


async def test_a_full_disk_is_told_from_other_failures() -> None:
    with pytest.raises(ResourceExhausted, match="the disk is full"):
        await run("x", ["dd", "if=/dev/zero", "of=/dev/full", "count=1"], deadline_s=10)


async def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(DeadlineExceeded, match="longer than 0 s"):
        await run("x", ["sleep", "60"], deadline_s=0.1)


async def test_nothing_of_a_cancelled_command_is_left() -> None:
    pids: list[int] = []
    started = asyncio.Event()

    def on_line(line: str) -> None:
        pids.append(int(line))
        started.set()

    script = "sleep 60 & echo $!; wait"
    task = asyncio.create_task(run("x", ["sh", "-c", script], deadline_s=60, on_line=on_line))
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if not alive(pids[0]):
            return
        await asyncio.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)
    pytest.fail("the child of a cancelled command lived on")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
