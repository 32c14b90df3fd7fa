"""The blocking faces of a machine, its commands and its forks: forkypig.sdk.machine and process without `await`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from forkypig import model
from forkypig.sdk import machine, process
from forkypig.sdk.client import OnProgress
from forkypig.sdk.machine import UNCHANGED
from forkypig.sdk.process import ExecResult, Output
from forkypig.sdk.transfer import Copied, OnBytes
from forkypig.sync.loop import Loop


class Process:
    """A running command; see forkypig.sdk.Process. Use as a context manager, and iterate over its output."""

    def __init__(self, loop: Loop, inner: process.Process) -> None:
        self._loop, self._inner = loop, inner

    def __enter__(self) -> Self:
        self._loop.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))

    def __iter__(self) -> Iterator[Output]:
        return self._loop.iterate(self._inner.__aiter__())

    @property
    def exit_code(self) -> int:
        return self._inner.exit_code

    @property
    def timed_out(self) -> bool:
        return self._inner.timed_out

    @property
    def failure(self) -> str:
        return self._inner.failure

    def wait(self) -> int:
        return self._loop.run(self._inner.wait())

    def write(self, data: bytes) -> None:
        self._loop.run(self._inner.write(data))

    def close_stdin(self) -> None:
        self._loop.run(self._inner.close_stdin())

    def resize(self, rows: int, columns: int) -> None:
        self._loop.run(self._inner.resize(rows, columns))

    def signal(self, number: int) -> None:
        self._loop.run(self._inner.signal(number))

    def terminate(self) -> None:
        self._loop.run(self._inner.terminate())


class Machine:
    """The handle of one machine; see forkypig.sdk.Machine."""

    def __init__(self, loop: Loop, inner: machine.Machine) -> None:
        self._loop, self._inner = loop, inner

    @property
    def id(self) -> model.MachineId:
        return self._inner.id

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def info(self) -> model.Machine:
        return self._inner.info

    @property
    def state(self) -> model.MachineState:
        return self._inner.state

    @property
    def ready_ms(self) -> float | None:
        return self._inner.ready_ms

    def __repr__(self) -> str:
        return repr(self._inner)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Machine) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def refresh(self) -> model.Machine:
        return self._loop.run(self._inner.refresh())

    def fork(
        self,
        count: int = 1,
        *,
        name: str = "",
        paused: bool = False,
        quiesce: bool = False,
        forget: Sequence[str] = (),
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
    ) -> "Fork":
        making = self._inner.fork(
            count, name=name, paused=paused, quiesce=quiesce, forget=forget, config=config, ttl_s=ttl_s
        )
        return fork_of(self._loop, self._loop.run(making))

    def renew(self, ttl_s: float = 0.0) -> model.Lease:
        return self._loop.run(self._inner.renew(ttl_s))

    def snapshot(self, tag: str = "", *, message: str = "", quiesce: bool = False) -> model.Snapshot:
        return self._loop.run(self._inner.snapshot(tag, message=message, quiesce=quiesce))

    def pause(self) -> None:
        self._loop.run(self._inner.pause())

    def resume(self) -> None:
        self._loop.run(self._inner.resume())

    def stop(self, *, force: bool = False) -> None:
        self._loop.run(self._inner.stop(force=force))

    def start(self) -> None:
        self._loop.run(self._inner.start())

    def restore(self, snapshot: str, *, keep_tag: str = "") -> None:
        self._loop.run(self._inner.restore(snapshot, keep_tag=keep_tag))

    def hibernate(self, *, on_progress: OnProgress | None = None) -> None:
        self._loop.run(self._inner.hibernate(on_progress=on_progress))

    def wake(self) -> None:
        self._loop.run(self._inner.wake())

    def update(self, change: model.ConfigChange) -> None:
        self._loop.run(self._inner.update(change))

    def remove(self) -> None:
        self._loop.run(self._inner.remove())

    def console(self, *, follow: bool = False) -> Iterator[bytes]:
        return self._loop.iterate(self._inner.console(follow=follow))

    def process(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        user: str = "",
        timeout_s: float = 0.0,
        terminal: tuple[int, int] | None = None,
        stdin: bool = False,
    ) -> Process:
        inner = self._inner.process(
            argv,
            environment=environment,
            directory=directory,
            user=user,
            timeout_s=timeout_s,
            terminal=terminal,
            stdin=stdin,
        )
        return Process(self._loop, inner)

    def exec(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        user: str = "",
        timeout_s: float = 0.0,
        stdin: bytes | None = None,
    ) -> ExecResult:
        return self._loop.run(
            self._inner.exec(
                argv, environment=environment, directory=directory, user=user, timeout_s=timeout_s, stdin=stdin
            )
        )

    def upload(self, source: str | Path, path: str, *, on_bytes: OnBytes | None = None) -> Copied:
        return self._loop.run(self._inner.upload(source, path, on_bytes=on_bytes))

    def download(self, path: str, target: str | Path, *, on_bytes: OnBytes | None = None) -> Copied:
        return self._loop.run(self._inner.download(path, target, on_bytes=on_bytes))

    def read_file(self, path: str) -> bytes:
        return self._loop.run(self._inner.read_file(path))

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._loop.run(self._inner.write_file(path, data, mode=mode))

    def download_into(self, path: str, file: IO[bytes], *, on_bytes: OnBytes | None = None) -> int:
        return self._loop.run(self._inner.download_into(path, file, on_bytes=on_bytes))

    def upload_from(
        self, file: IO[bytes], size: int, path: str, *, mode: int = 0o644, on_bytes: OnBytes | None = None
    ) -> None:
        self._loop.run(self._inner.upload_from(file, size, path, mode=mode, on_bytes=on_bytes))


@dataclass(frozen=True, slots=True)
class Fork:
    """What a fork made; see forkypig.sdk.Fork."""

    snapshot: model.Snapshot
    parent: model.MachineId | None
    pause_ms: float
    children: tuple[Machine, ...]


def fork_of(loop: Loop, made: machine.Fork) -> Fork:
    children = tuple(Machine(loop, child) for child in made.children)
    return Fork(made.snapshot, made.parent, made.pause_ms, children)
