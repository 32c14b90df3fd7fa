"""The probe against the real QEMU: a guest that works, one that does not, and what this host's KVM is worth."""

import asyncio
import time
from pathlib import Path

import pytest

from forkypig.errors import NotPossibleNow
from forkypig.qemu import accelerator, probe_guest

pytestmark = pytest.mark.live
QEMU = "qemu-system-x86_64"


@pytest.fixture
def guest(tmp_path: Path) -> list[str]:
    """QEMU arguments that start the probe guest."""
    image = tmp_path / "guest"
    image.write_bytes(probe_guest.MULTIBOOT_IMAGE)
    return ["-kernel", str(image)]


def qemus_of(directory: Path) -> list[str]:
    """Command lines of running processes that mention `directory`."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = cmdline.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in text and "-kernel" in text:
            found.append(text)
    return found


async def test_the_guest_gets_to_its_last_line_on_a_sound_cpu(guest: list[str]) -> None:
    """TCG is a sound CPU, so a KVM in which the guest fails is to blame and not the guest."""
    assert await accelerator.run_guest(QEMU, "tcg", guest, probe_guest.READY, timeout_s=20) is None


async def test_a_guest_that_hangs_is_ended(guest: list[str], tmp_path: Path) -> None:
    said = await accelerator.run_guest(QEMU, "tcg", guest, b"a line that never comes", timeout_s=0.5)
    assert said is not None
    assert "hangs" in said
    assert qemus_of(tmp_path) == []


async def test_a_probe_that_is_cancelled_leaves_no_qemu(guest: list[str], tmp_path: Path) -> None:
    task = asyncio.create_task(accelerator.run_guest(QEMU, "tcg", guest, b"never", timeout_s=30))
    deadline = time.monotonic() + 60
    while not qemus_of(tmp_path) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert qemus_of(tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert qemus_of(tmp_path) == []


async def test_auto_agrees_with_what_kvm_does_here(guest: list[str], tmp_path: Path) -> None:
    works = (
        accelerator.KVM_DEVICE.exists() and await accelerator.run_guest(QEMU, "kvm", guest, probe_guest.READY) is None
    )
    chosen = await accelerator.choose(QEMU, "auto", tmp_path / "cache")
    assert (chosen.name, chosen.cpu_model) == (("kvm", "host") if works else ("tcg", "max"))
    assert chosen.reason
    if works:
        assert (await accelerator.choose(QEMU, "kvm", tmp_path / "cache")).name == "kvm"
    else:
        with pytest.raises(NotPossibleNow):
            await accelerator.choose(QEMU, "kvm", tmp_path / "cache")
