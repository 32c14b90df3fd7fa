"""The default image: built with the real tools, booted under TCG, and built in ways that must fail."""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkypig.errors import NotPossibleNow
from forkypig.guest.calls import ExecSpec, Exited, Output
from forkypig.guest.channel import GuestChannel, Identity
from forkypig.images import apt
from forkypig.images.debian import build_default
from forkypig.images.store import ImageFiles, ImageStore
from forkypig.model import Image, Progress
from tests.live.conftest import IMAGES

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root"),
    pytest.mark.timeout(900),  # the first test builds when nothing has built before
]

_BUILD_LIMIT_S = 600.0
_BOOT_LIMIT_S = 120.0  # 4 s on an idle core


@pytest.fixture
async def image() -> Image:
    """The image that the whole suite shares, built by the first who needs it."""
    async with asyncio.timeout(_BUILD_LIMIT_S):
        return await build_default(ImageStore(IMAGES), progress=lambda progress: None)


@contextlib.asynccontextmanager
async def booted(files: ImageFiles, directory: Path) -> AsyncIterator[tuple[GuestChannel, Path]]:
    """A plain QEMU on a 1 GiB copy-on-write disk; its agent's channel, open, and its console's file."""
    overlay, port, console = directory / "overlay.qcow2", directory / "agent.sock", directory / "console"
    create = await asyncio.create_subprocess_exec(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-F", files.disk_format, "-b", files.disk, overlay, "1G")
    )
    assert await asyncio.wait_for(create.wait(), 30) == 0
    qemu = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"),
        *("-machine", "q35,accel=tcg", "-cpu", "max", "-m", "512M"),
        *("-device", "vmgenid,guid=auto", "-serial", f"file:{console}"),
        *("-drive", f"if=virtio,format=qcow2,file={overlay}"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={port},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=forky.agent.0"),
        *("-kernel", files.kernel, "-initrd", files.initrd, "-append", files.cmdline),
    )
    channel = GuestChannel("test")
    try:
        deadline = time.monotonic() + 30
        while not port.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        identity = Identity(hostname="piglet", machine_id="0123456789abcdef" * 2)
        try:
            await channel.open(port, identity=identity, orphans="kill", deadline_s=_BOOT_LIMIT_S)
        except Exception as error:
            words = console.read_text(errors="replace") if console.exists() else ""
            raise AssertionError(f"the agent did not answer; the console says:\n{words}") from error
        yield channel, console
    finally:
        await channel.close()
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.wait()


async def test_the_image_is_small_whole_and_built_only_once(image: Image) -> None:
    store = ImageStore(IMAGES)
    await store.verify(image.id)
    assert image.size_bytes < 200 << 20
    assert sum(path.stat().st_blocks * 512 for path in (IMAGES / image.id).iterdir()) < 200 << 20
    seen: list[Progress] = []
    started = time.monotonic()
    assert await build_default(store, progress=seen.append) == image
    assert time.monotonic() - started < 2.0
    assert seen == []


async def output(channel: GuestChannel, script: str) -> str:
    """What a shell script in the guest prints; it must succeed."""
    out = b""
    async for event in await channel.exec(ExecSpec(argv=["sh", "-ec", script], timeout_s=60)):
        if isinstance(event, Output):
            out += event.data
        elif isinstance(event, Exited):
            assert event.code == 0, f"{script}: {event.code}\n{out.decode()}"
    return out.decode().strip()


async def test_the_image_boots_its_agent(image: Image, tmp_path: Path) -> None:
    files = ImageStore(IMAGES).files(image.id)
    async with booted(files, tmp_path) as (channel, console):
        assert await output(channel, "uname -r; hostname") == f"{image.kernel}\npiglet"
        assert "/usr/lib/forky/agent.pyc" in await output(channel, "tr '\\0' ' ' </proc/1/cmdline")
        mounts = [line.split() for line in (await output(channel, "cat /proc/mounts")).splitlines()]
        wanted = {"/": "ext4", "/dev": "devtmpfs", "/proc": "proc", "/run": "tmpfs", "/dev/pts": "devpts"}
        assert {fields[1]: fields[2] for fields in mounts if fields[1] in wanted} == wanted
        assert len({fields[1] for fields in mounts}) == len(mounts)  # nothing is mounted twice
        # The driver that makes a fork reseed the kernel's generator must have found its device.
        assert await output(channel, "ls -d /sys/bus/acpi/drivers/vmgenid/*:*")
        assert await output(channel, "cat /sys/class/net/eth0/operstate")
        await output(channel, "modprobe overlay && modprobe nft_masq && grep -q overlay /proc/filesystems")
        await output(channel, "python3 -c 'import asyncio, ctypes, lzma, readline, sqlite3, ssl, zoneinfo'")
        # The overlay has 1 GiB, and so has the file system when it was grown.
        await output(channel, "resize2fs /dev/vda")
        assert int(await output(channel, "df --output=size -m / | tail -1")) > 900
        assert "EXT4-fs error" not in await output(channel, "dmesg")
        assert "Kernel panic" not in console.read_text(errors="replace")


async def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    under_way = asyncio.Event()

    def progress(progress: Progress) -> None:
        if progress.done > 20:  # dpkg runs in the new root
            under_way.set()

    building = asyncio.create_task(build_default(store, progress=progress))
    await asyncio.wait(
        {building, asyncio.create_task(under_way.wait())},
        timeout=_BUILD_LIMIT_S,
        return_when=asyncio.FIRST_COMPLETED,
    )
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert [path.name for path in store.root.iterdir()] == [".build.lock"]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert processes_below(tmp_path) == []
    assert store.list() == []


async def test_a_mirror_that_cant_be_reached_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(apt, "host_options", no_options)
    store = ImageStore(tmp_path / "images")
    with pytest.raises(NotPossibleNow, match="reaches its Debian mirror"):
        await build_default(store, progress=lambda progress: None)
    assert [path.name for path in store.root.iterdir()] == [".build.lock"]


async def no_options() -> list[str]:
    """The host's own proxy would win over the environment's."""
    return []


async def test_a_missing_tool_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda program, **more: None if program == "mmdebstrap" else which(program, **more)
    )
    with pytest.raises(NotPossibleNow, match="apt-get install mmdebstrap"):
        await build_default(ImageStore(tmp_path / "images"), progress=lambda progress: None)
    assert not (tmp_path / "images").exists()


def processes_below(directory: Path) -> list[str]:
    """Processes whose root or working directory is in `directory`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for link in ("root", "cwd"):
                with contextlib.suppress(OSError):
                    if str((process / link).readlink()).startswith(str(directory)):
                        found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found
