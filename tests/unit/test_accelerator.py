"""What QEMU's answers are read as, and what is chosen without asking a KVM."""

import stat
from pathlib import Path

import pytest

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.qemu import accelerator, build

DEBIAN_12 = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 Fabrice Bellard\n"
UBUNTU_MACHINES = """Supported machines are:
microvm              microvm (i386)
ubuntu-q35           Ubuntu 24.04 PC (Q35 + ICH9, 2009) (alias of pc-q35-noble)
pc-q35-noble         Ubuntu 24.04 PC (Q35 + ICH9, 2009)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-8.2)
pc-q35-8.2           Standard PC (Q35 + ICH9, 2009)
pc-q35-8.1           Standard PC (Q35 + ICH9, 2009)
"""
# Branches of a shell `case`: the questions that QEMU answers without starting a machine.
QEMU_8_2 = """-version) echo QEMU emulator version 8.2.2;;
    -machine) echo "q35 Standard PC (alias of pc-q35-8.2)";; -L) ;;"""


def script(path: Path, body: str) -> str:
    """An executable that stands where QEMU would."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_distribution_s_version_is_kept_in_the_text() -> None:
    assert build.parse_version(DEBIAN_12) == ((7, 2, 22), "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)")
    assert build.parse_version("QEMU emulator version 10.0.2\n") == ((10, 0, 2), "10.0.2")


def test_another_program_s_version_is_refused() -> None:
    with pytest.raises(NotPossibleNow, match="is not QEMU's version"):
        build.parse_version("GNU coreutils 9.1\n")


def test_the_machine_type_is_the_versioned_one_behind_q35() -> None:
    assert build.parse_machine_type(UBUNTU_MACHINES) == "pc-q35-8.2"


def test_a_qemu_without_q35_is_refused() -> None:
    with pytest.raises(NotPossibleNow, match="no q35 machine"):
        build.parse_machine_type("Supported machines are:\nvirt-9.0   QEMU 9.0 ARM Virtual Machine\n")


async def test_a_missing_qemu_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(NotPossibleNow, match="apt install qemu-system-x86"):
        await build.qemu_build(str(tmp_path / "qemu"))


async def test_an_old_qemu_is_named(tmp_path: Path) -> None:
    old = script(tmp_path / "qemu", 'case "$1" in -version) echo "QEMU emulator version 6.2.0";; *) echo;; esac')
    with pytest.raises(NotPossibleNow, match=r"QEMU 6\.2\.0 is too old: Forky Pig needs 7\.2"):
        await build.qemu_build(old)


async def test_a_qemu_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = script(tmp_path / "qemu", "echo libfdt.so.1 is missing >&2; exit 127")
    with pytest.raises(NotPossibleNow, match=r"libfdt\.so\.1 is missing"):
        await build.qemu_build(broken)


async def test_the_build_id_changes_with_the_program(tmp_path: Path) -> None:
    body = f"case $1 in {QEMU_8_2} esac"
    first = await build.qemu_build(script(tmp_path / "one", body))
    second = await build.qemu_build(script(tmp_path / "two", body + "\n# rebuilt"))
    assert (first.version, first.machine_type) == ((8, 2, 2), "pc-q35-8.2")
    assert first.version_text == second.version_text
    assert first.build_id != second.build_id


async def test_tcg_is_taken_without_touching_kvm(tmp_path: Path) -> None:
    chosen = await accelerator.choose("/nonexistent/qemu", "tcg", tmp_path)
    assert (chosen.name, chosen.cpu_model) == ("tcg", "max")


async def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="«xen»"):
        await accelerator.choose("qemu", "xen", tmp_path)


async def test_without_the_device_auto_is_tcg_and_kvm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    chosen = await accelerator.choose("/nonexistent/qemu", "auto", tmp_path)
    assert chosen.name == "tcg"
    assert f"there is no {tmp_path / 'kvm'}" in chosen.reason
    with pytest.raises(NotPossibleNow, match="FORKY_ACCELERATOR=auto"):
        await accelerator.choose("/nonexistent/qemu", "kvm", tmp_path)


async def test_the_finding_is_kept_until_qemu_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in aborts when it is started with a guest, and counts how often that is."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    body = (
        f"""case $1 in {QEMU_8_2} -nodefaults) echo started >> {tmp_path}/starts; echo no such MSR >&2; exit 1;; esac"""
    )
    qemu = script(tmp_path / "qemu", body)
    for _ in range(2):
        chosen = await accelerator.choose(qemu, "auto", tmp_path / "cache")
        assert chosen.name == "tcg"
        assert "no such MSR" in chosen.reason
    assert (tmp_path / "starts").read_text().split() == ["started"]
    script(tmp_path / "qemu", body + "\n# another build")
    await accelerator.choose(qemu, "auto", tmp_path / "cache")
    assert (tmp_path / "starts").read_text().split() == ["started"] * 2
