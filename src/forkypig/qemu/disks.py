"""qcow2 overlays. A machine writes to one overlay; a split leaves it behind, read-only for ever, below new ones.

An empty overlay depends only on its size and what it stands on, so one is made by qemu-img and copied: a copy costs
a hundred microseconds where a qemu-img process costs 20 ms.
"""

import asyncio
import contextlib
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from forkypig.errors import MachineFailed, ResourceExhausted

_QEMU_IMG_TIMEOUT_S = 60.0  # metadata only, but the host may be busy with a hundred shells


async def create_overlays(paths: Sequence[Path], *, backing: Path, backing_format: str, size_mib: int) -> None:
    """Makes empty overlays of `size_mib` over `backing`. All of them or none."""
    if not paths:
        return
    first, *others = paths
    try:
        await _qemu_img(
            *("create", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", str(backing)),
            *("-o", "lazy_refcounts=on"),
            *(str(first), f"{size_mib}M"),
        )
        for path in others:
            await asyncio.to_thread(shutil.copyfile, first, path)
    except OSError as error:
        _remove(paths)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted("the disk is full: free space below FORKY_HOME and try again") from error
        raise
    except BaseException:
        _remove(paths)
        raise


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


async def _qemu_img(*arguments: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise MachineFailed("there is no qemu-img: install qemu-utils") from error
    try:
        async with asyncio.timeout(_QEMU_IMG_TIMEOUT_S):
            _, stderr = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode != 0:
        words = stderr.decode(errors="replace").strip()
        if "No space left" in words:
            raise ResourceExhausted("the disk is full: free space below FORKY_HOME and try again")
        raise MachineFailed(f"qemu-img failed: {words or process.returncode}")
