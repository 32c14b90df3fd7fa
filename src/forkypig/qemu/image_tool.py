"""qemu-img, run with a deadline and with its words made ours."""

import asyncio
import contextlib

from forkypig.errors import DeadlineExceeded, MachineFailed, full_disk

_TIMEOUT_S = 60.0  # metadata only, but the host may be busy with a hundred shells


async def qemu_img(*arguments: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Runs `qemu-img ARGUMENTS`; its output. Raises MachineFailed with its reason, ResourceExhausted when the disk is
    full, or DeadlineExceeded."""
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise MachineFailed("there is no qemu-img: install qemu-utils") from error
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"qemu-img {arguments[0]} took longer than {timeout_s:g} s: is the disk hung?"
        ) from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode != 0:
        words = stderr.decode(errors="replace").strip()
        if "No space left" in words:
            raise full_disk()
        raise MachineFailed(f"qemu-img failed: {words or process.returncode}")
    return stdout.decode()
