"""Disks of the processes that are started without Forky Pig."""

import asyncio
from pathlib import Path

from forkypig.errors import MachineFailed

_LIMIT_S = 30.0


async def create(path: Path, size_mib: int, backing: tuple[Path, str] | None = None) -> None:
    """Makes an empty qcow2; `backing` is an image and its format. Raises MachineFailed; qemu-img has said why."""
    below = ["-b", str(backing[0]), "-F", backing[1]] if backing is not None else []
    child = await asyncio.create_subprocess_exec(
        "qemu-img", "create", "-q", "-f", "qcow2", *below, str(path), f"{size_mib}M"
    )
    async with asyncio.timeout(_LIMIT_S):
        if await child.wait() != 0:
            raise MachineFailed(f"qemu-img can't make {path.name}: its message is above")
