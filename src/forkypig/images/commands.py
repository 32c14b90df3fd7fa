"""Running the programs that build an image, with their last words kept and nothing of them left behind."""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from forkypig.errors import DeadlineExceeded, NotPossibleNow, ResourceExhausted

_LAST_LINES = 12
_GRACE_S = 5.0  # mmdebstrap cleans up after itself on SIGTERM
_MAX_LINE = 1 << 20  # dpkg prints its progress with carriage returns, as one long line


async def run(
    what: str,
    arguments: Sequence[str],
    *,
    deadline_s: float,
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    stdin: bytes = b"",
) -> str:
    """Runs a program to its end and returns its output, stdout and stderr as one. `what` is for messages: "packages
    could not be installed". `on_line` sees each line as it comes.

    Raises NotPossibleNow with the last lines when it fails, ResourceExhausted when a disk was full, and
    DeadlineExceeded. However this ends, the process group is gone.
    """
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment) if environment is not None else clean_environment(),
        cwd=directory,
        start_new_session=True,
        limit=_MAX_LINE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(deadline_s):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(stdin)
                await process.stdin.drain()
            process.stdin.close()
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
                lines.append(line)
                on_line(line)
            code = await process.wait()
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what}: {arguments[0]} took longer than {deadline_s:.0f} s") from error
    finally:
        await _end(process)
    if code != 0:
        raise _failure(what, arguments[0], code, lines)
    return "\n".join(lines)


def _failure(what: str, program: str, code: int, lines: Sequence[str]) -> Exception:
    if any("No space left on device" in line for line in lines):
        return ResourceExhausted(f"{what}: the disk is full; free some space and try again")
    last = "\n  ".join(deque((line for line in lines if line), maxlen=_LAST_LINES))
    hint = ""
    if any(
        words in last for words in ("Failed to fetch", "Could not resolve", "Could not connect", "Unable to connect")
    ):
        hint = "; check that this computer reaches its Debian mirror, and try again"
    return NotPossibleNow(f"{what}: {program} ended with {code}{hint}. Its last words:\n  {last}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends what is left of the process's group: by request, then by force."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        await process.wait()


def clean_environment() -> dict[str, str]:
    """What programs of a build see: a plain locale, the administrator's paths, the user's proxies, no questions."""
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**kept, "PATH": path, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
