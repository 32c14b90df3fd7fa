"""Which build of QEMU is installed, down to its firmware.

Device state is only sure to load in the build that saved it: firmware and option ROMs are read-only memory that every
process loads for itself from files, so they belong to the build as well as the program does.
"""

import asyncio
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from forkypig.errors import NotPossibleNow

OLDEST = (7, 2)
INSTALL = "`apt install qemu-system-x86`, or set FORKY_QEMU to the program"

_ASK_TIMEOUT_S = 20.0  # it answers in 50 ms; a cold disk and a busy host take longer
_FIRMWARE = ("bios-256k.bin", "kvmvapic.bin")  # what a q35 machine without -kernel loads


@dataclass(frozen=True, slots=True)
class QemuBuild:
    """One installed QEMU."""

    program: str  # absolute path
    version: tuple[int, ...]  # (7, 2, 22)
    version_text: str  # "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    build_id: str  # the text and a hash of program and firmware: equal means that snapshots can be exchanged
    machine_type: str  # "pc-q35-7.2", what «q35» stands for


async def qemu_build(qemu: str) -> QemuBuild:
    """Asks the program (a path, or a name looked up in PATH). Raises NotPossibleNow, with what to do, when it is
    missing, does not answer, or is too old."""
    program = shutil.which(qemu)
    if program is None:
        raise NotPossibleNow(f"there is no QEMU here («{qemu}»): {INSTALL}")
    version_output, machines, data_dirs = await asyncio.gather(
        _ask(program, "-version"), _ask(program, "-machine", "help"), _ask(program, "-L", "help")
    )
    version, text = parse_version(version_output)
    if version[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NotPossibleNow(f"QEMU {text} is too old: Forky Pig needs {oldest} or later; {INSTALL}")
    digest = await asyncio.to_thread(_digest, Path(program), [Path(line) for line in data_dirs.split("\n") if line])
    return QemuBuild(program, version, text, f"{text} {digest}", parse_machine_type(machines))


async def _ask(program: str, *arguments: str) -> str:
    """What QEMU prints for a question that starts no machine."""
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise NotPossibleNow(f"{program} can't be started ({error.strerror}): {INSTALL}") from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _ASK_TIMEOUT_S)
    except TimeoutError as error:
        raise NotPossibleNow(f"{program} {' '.join(arguments)} does not answer: is it QEMU? {INSTALL}") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise NotPossibleNow(f"{program} {' '.join(arguments)} failed ({text.strip()[-200:]}): {INSTALL}")
    return text


def parse_version(output: str) -> tuple[tuple[int, ...], str]:
    """`qemu -version` -> ((7, 2, 22), "7.2.22 (Debian …)"). Raises NotPossibleNow when it is no QEMU's answer."""
    match = re.search(r"^QEMU emulator version ((\d+(?:\.\d+)+).*)$", output, re.MULTILINE)
    if match is None:
        raise NotPossibleNow(f"«{output.strip()[:80]}» is not QEMU's version: {INSTALL}")
    return tuple(int(part) for part in match[2].split(".")), match[1].strip()


def parse_machine_type(output: str) -> str:
    """`qemu -machine help` -> the versioned type that «q35» is an alias of. Raises NotPossibleNow without one."""
    match = re.search(r"^q35\s.*\(alias of (\S+?)\)", output, re.MULTILINE)
    if match is None:
        raise NotPossibleNow(f"this QEMU has no q35 machine: {INSTALL}")
    return match[1]


def _digest(program: Path, data_dirs: list[Path]) -> str:
    """12 hex digits over the program and the firmware that it would load."""
    total = hashlib.sha256()
    firmware = (next((d / name for d in data_dirs if (d / name).is_file()), None) for name in _FIRMWARE)
    for path in (program, *firmware):
        if path is not None:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]
