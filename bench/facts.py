"""What the figures were measured on."""

import asyncio
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.instance import CHECKOUT, Instance
from bench.processes import cores

_COMMAND_S = 30.0


async def gather(here: Instance) -> dict[str, Any]:
    """Of the host, of QEMU, of the image, of this checkout."""
    forky, settings = here.forky, here.settings
    status = await forky.status()
    image = (await forky.images())[-1]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "git_commit": await _git("rev-parse", "HEAD") or "unknown",
        "git_uncommitted_changes": bool(await _git("status", "--porcelain", "--untracked-files=no")),
        "cores": cores(),
        "cpu": _cpu_model(),
        "memory_mib": memory_kib >> 10,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "qemu": status.qemu_version,
        "qemu_build": (await _output(settings.qemu, "--version")).partition("\n")[0],
        "accelerator": status.accelerator,
        "accelerator_reason": status.accelerator_reason,
        "image": image.name,
        "image_sha256": image.sha256,
        "guest_kernel": image.kernel,
        "network": settings.network,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


async def _git(*arguments: str) -> str:
    return (await _output("git", "-C", str(CHECKOUT), *arguments)).strip()


async def _output(*argv: str) -> str:
    """What a command printed; empty when it is missing or fails (a source archive has no git)."""
    try:
        child = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except FileNotFoundError:
        return ""
    async with asyncio.timeout(_COMMAND_S):
        out, _ = await child.communicate()
    return out.decode(errors="replace") if child.returncode == 0 else ""
