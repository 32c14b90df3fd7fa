"""A command's output with a limit: its beginning and its end are kept, what is between is counted.

The end has the error that somebody looks for, the beginning says what it was about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forkypig.sdk.process import drain

if TYPE_CHECKING:
    from forkypig.sdk.machine import Machine


class Kept:
    """The first and the last half of `most` bytes."""

    def __init__(self, most: int) -> None:
        self._half = max(most // 2, 1)
        self._head, self._tail = bytearray(), bytearray()
        self.omitted = 0  # bytes left out between the two

    def add(self, data: bytes) -> None:
        """Takes what comes next."""
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if (over := len(self._tail) - self._half) > 0:
            del self._tail[:over]
            self.omitted += over

    def joined(self) -> bytes:
        """What was kept, with a line in the middle that says how much is not there."""
        note = f"\n[… {self.omitted} bytes left out …]\n".encode() if self.omitted else b""
        return bytes(self._head) + note + bytes(self._tail)


@dataclass(frozen=True, slots=True)
class LimitedResult:
    """A command's end, as in `ExecResult`; of each stream also how many bytes were left out in the middle."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_omitted: int
    stderr_omitted: int
    timed_out: bool
    failure: str


async def exec_limited(
    machine: "Machine",
    argv: Sequence[str],
    *,
    most_bytes: int,
    environment: Mapping[str, str] | None = None,
    directory: str = "",
    user: str = "",
    timeout_s: float = 0.0,
    stdin: bytes | None = None,
) -> LimitedResult:
    """`Machine.exec` that holds at most `most_bytes` of each stream, however much the command writes."""
    kept = {"stdout": Kept(most_bytes), "stderr": Kept(most_bytes)}
    process = machine.process(
        argv,
        environment=environment,
        directory=directory,
        user=user,
        timeout_s=timeout_s,
        stdin=stdin is not None,
    )
    await drain(process, stdin, lambda output: kept[output.stream].add(output.data))
    out, err = kept["stdout"], kept["stderr"]
    return LimitedResult(
        process.exit_code,
        out.joined(),
        err.joined(),
        out.omitted,
        err.omitted,
        process.timed_out,
        process.failure,
    )
