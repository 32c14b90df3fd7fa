"""Which QEMU is here, and whether KVM works with it: a KVM that really runs a guest, not only a /dev/kvm that opens.

On some nested hosts /dev/kvm opens, a BIOS runs, and then the guest hangs as soon as it enters protected mode, or QEMU
aborts when it sets an MSR. So a tiny guest is run under KVM that does what a kernel does first
(probe_guest.S); where the caller has a kernel, that is started too. The answer is kept per boot of the host, build of
QEMU and host kernel, because a guest that hangs costs seconds of CPU.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import structlog

from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.qemu import probe_guest
from forkypig.qemu.build import QemuBuild, qemu_build

__all__ = ["Accelerator", "QemuBuild", "choose", "qemu_build"]

log = structlog.get_logger()

KVM_DEVICE = Path("/dev/kvm")
# The guest is ready after 0.1 s; one that hangs usually keeps a core busy for all of this.
PROBE_TIMEOUT_S = 3.0
_KERNEL_TIMEOUT_S = 8.0  # it unpacks itself first: half a second under KVM, five under TCG
# A guest that got hardly any CPU, because the host is busy, gets this much more before KVM is blamed.
_PATIENCE_S = 7.0
_STARVED_CPU_S = 1.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What machines run on, and why that."""

    name: Literal["kvm", "tcg"]
    cpu_model: Literal["host", "max"]
    reason: str  # a sentence without a full stop


@dataclass(frozen=True, slots=True)
class _Finding:
    works: bool
    detail: str


async def choose(qemu: str, wanted: str, cache_dir: Path, kernel: Path | None = None) -> Accelerator:
    """The accelerator to use: `wanted` is "auto", "kvm" or "tcg"; `kernel` is one to boot in the probe as well.

    Raises NotPossibleNow when "kvm" is wanted and does not work, or QEMU is missing; InvalidRequest for another word.
    """
    if wanted not in ("auto", "kvm", "tcg"):
        raise InvalidRequest(f"there is no accelerator «{wanted}»: set FORKY_ACCELERATOR to auto, kvm or tcg")
    if wanted == "tcg":
        return Accelerator("tcg", "max", "TCG was asked for (FORKY_ACCELERATOR=tcg)")
    finding = await _kvm(qemu, cache_dir, kernel)
    if finding.works:
        return Accelerator("kvm", "host", finding.detail)
    if wanted == "kvm":
        raise NotPossibleNow(
            f"KVM was asked for (FORKY_ACCELERATOR=kvm) but can't be used here: {finding.detail}; "
            "set FORKY_ACCELERATOR=auto to run under TCG"
        )
    return Accelerator("tcg", "max", f"TCG, because {finding.detail}")


async def _kvm(qemu: str, cache_dir: Path, kernel: Path | None) -> _Finding:
    """Whether KVM works; asked of the cache first."""
    if (obstacle := _device_obstacle()) is not None:
        return _Finding(False, obstacle)
    build = await qemu_build(qemu)
    key = _cache_key(build, kernel)
    cached = await asyncio.to_thread(_read_cache, cache_dir, key)
    if cached is not None:
        return cached
    finding = await _probe(build.program, kernel)
    log.info("kvm probed", works=finding.works, detail=finding.detail)
    await asyncio.to_thread(_write_cache, cache_dir, key, finding)
    return finding


def _device_obstacle() -> str | None:
    """Why /dev/kvm can't even be opened; None when it can."""
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {KVM_DEVICE}"
    except PermissionError:
        return f"{KVM_DEVICE} may not be opened by this user"
    except OSError as error:
        return f"{KVM_DEVICE} can't be opened: {error.strerror}"
    return None


# -- the cache --------------------------------------------------------------------------------------------------------


def _cache_key(build: QemuBuild, kernel: Path | None) -> dict[str, str]:
    """All that the finding depends on."""
    if kernel is None:
        kernel_identity = ""
    else:
        stat = kernel.stat()
        kernel_identity = f"{kernel}:{stat.st_size}:{stat.st_mtime_ns}"
    return {
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "host_kernel": platform.release(),
        "qemu_build": build.build_id,
        "guest": hashlib.sha256(probe_guest.MULTIBOOT_IMAGE).hexdigest()[:16],
        "kernel": kernel_identity,
    }


def _read_cache(cache_dir: Path, key: dict[str, str]) -> _Finding | None:
    try:
        kept = json.loads((cache_dir / "kvm-probe.json").read_text())
        if kept["key"] == key:
            return _Finding(bool(kept["works"]), str(kept["detail"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _write_cache(cache_dir: Path, key: dict[str, str], finding: _Finding) -> None:
    """Best effort: without the cache the next start probes again."""
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        path = cache_dir / "kvm-probe.json"
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"key": key, **asdict(finding)}, indent=1))
        draft.replace(path)


# -- the probe --------------------------------------------------------------------------------------------------------


async def _probe(program: str, kernel: Path | None) -> _Finding:
    """Runs the built-in guest, then `kernel` where there is one."""
    with tempfile.TemporaryDirectory(prefix="forky-probe-") as directory:
        guest = Path(directory) / "guest"
        guest.write_bytes(probe_guest.MULTIBOOT_IMAGE)
        failure = await run_guest(program, "kvm", ["-kernel", str(guest)], probe_guest.READY)
    if failure is not None:
        return _Finding(False, f"{KVM_DEVICE} opens but runs no guest: {failure}")
    if kernel is None:
        return _Finding(True, "a probe guest ran under KVM (long mode, page faults and timer interrupts work)")
    # "Linux version" is the first line a kernel prints; nokaslr because this guest is small.
    boot = ["-kernel", str(kernel), "-append", "earlyprintk=ttyS0 console=ttyS0 nokaslr panic=-1"]
    failure = await run_guest(program, "kvm", boot, b"Linux version", _KERNEL_TIMEOUT_S)
    if failure is not None:
        return _Finding(False, f"KVM runs a small guest but boots no Linux kernel: {failure}")
    return _Finding(True, "a Linux kernel booted under KVM")


async def run_guest(
    program: str,
    accelerator: Literal["kvm", "tcg"],
    boot: Sequence[str],
    line: bytes,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> str | None:
    """Runs a guest until it prints `line` on its serial port. Returns None when it did, else what happened instead,
    as the end of a sentence. QEMU has ended when this returns, however it returns."""
    arguments = [
        *_bound_to_us(),
        program,
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-machine", f"q35,accel={accelerator}"),
        *("-cpu", "host" if accelerator == "kvm" else "max"),
        *("-m", "256M"),
        *("-serial", "stdio"),
        *boot,
    ]
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    stderr = asyncio.create_task(cast(asyncio.StreamReader, process.stderr).read())
    serial = asyncio.create_task(_until(cast(asyncio.StreamReader, process.stdout), line))
    try:
        await asyncio.wait({serial}, timeout=timeout_s)
        if not serial.done() and _cpu_s(process.pid) < min(_STARVED_CPU_S, timeout_s / 3):
            await asyncio.wait({serial}, timeout=_PATIENCE_S)
        seen = serial.result() if serial.done() else None
    finally:
        serial.cancel()
        if process.returncode is None:
            _end(process.pid)
        await process.wait()
        said = await stderr
    if seen is None:
        return f"the guest hangs (no «{line.decode()}» on its serial port in {timeout_s:.0f} s or more)"
    return None if seen else f"QEMU ended at once, saying «{_first_line(said)}»"


def _end(pid: int) -> None:
    """Kills a child of ours that may have ended. Not by asyncio's own kill(): in Python 3.11 that can reap a child that
    has just ended, and asyncio then complains that it is missing."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _bound_to_us() -> list[str]:
    """What makes QEMU end when we are killed: a hanging guest would keep a core busy for ever. setpriv is part of
    util-linux, which Debian and Ubuntu always have; it executes QEMU in its place, so the pid is QEMU's."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


async def _until(stream: asyncio.StreamReader, line: bytes) -> bool:
    """Whether `line` came before the end of the stream."""
    seen = b""
    while chunk := await stream.read(4096):
        seen += chunk
        if line in seen:
            return True
    return False


def _cpu_s(pid: int) -> float:
    """CPU time of a process, seconds (proc(5): utime and stime)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _first_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("qemu-system-x86_64: ")[:200] if lines else "nothing"
