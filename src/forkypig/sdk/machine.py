"""The handle of one machine, with everything that can be done to it and in it."""

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from forkypig import model
from forkypig.sdk.connection import LONG_S, MACHINE_S, QUICK_S, calls, translated
from forkypig.sdk.process import Command, ExecResult, Process, collect
from forkypig.sdk.transfer import Copied, OnBytes, Transfer
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire import convert
from forkypig.wire.config import change_to_wire

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky, OnProgress


UNCHANGED = model.ConfigChange()


@dataclass(frozen=True, slots=True)
class Fork:
    """What a fork made. `parent` is None when a snapshot was forked; `pause_ms` is how long the parent stood still,
    0 when it did not run."""

    snapshot: model.Snapshot
    parent: model.MachineId | None
    pause_ms: float
    children: "tuple[Machine, ...]"


class Machine:
    """A machine as it was when last asked (`info`), and the verbs on it. Two handles of one machine are equal.

    Every verb raises HostUnreachable when the daemons can't be reached, NotFound when the machine is gone, and Busy
    while another operation is under way on it."""

    def __init__(self, forky: "Forky", info: model.Machine, ready_ms: float | None = None) -> None:
        self._forky = forky
        self.info = info
        self.pool = ""  # the pool that a run took it from
        self.ready_ms = ready_ms  # of the run or fork that made this handle: until the agent had confirmed

    @property
    def id(self) -> model.MachineId:
        """Its id, for ever the same."""
        return self.info.id

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def state(self) -> model.MachineState:
        """Its state when last asked; see `refresh`."""
        return self.info.state

    def __repr__(self) -> str:
        return f"<Machine {self.name} {self.id} {self.state.value}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Machine) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    # Life.

    async def refresh(self) -> model.Machine:
        """Asks again how the machine is, and returns it."""
        with calls(self._forky.socket):
            message = await self._forky.controller.GetMachine(pb.MachineRequest(machine=self.id), timeout=QUICK_S)
        self.info = convert.machine_from_wire(message)
        return self.info

    async def fork(
        self,
        count: int = 1,
        *,
        name: str = "",
        paused: bool = False,
        quiesce: bool = False,
        forget: Sequence[str] = (),
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
    ) -> Fork:
        """Splits the machine into itself and `count` children (1 to 1000) that inherit its memory and its disk.

        A running machine goes on; a paused one stays paused. Children are called NAME-1, NAME-2, … (`name` "" is the
        machine's own name), and are handed out when their agent has confirmed its new identity.
        `quiesce` freezes the guest's user processes before the split; they go on when each machine has its own entropy.
        `forget` names environment variables whose values are wiped in the children. `config` is what differs from the
        machine's own config, which children inherit but for the published ports; limits can only become tighter.
        With `ttl_s` each child is removed when it was not used for so many seconds; of the machine's own lease they
        inherit nothing.
        Raises InvalidRequest, NotPossibleNow, ResourceExhausted, MachineFailed, GuestUnresponsive."""
        return await self._forky.fork(
            self.id, count, name=name, paused=paused, quiesce=quiesce, forget=forget, config=config, ttl_s=ttl_s
        )

    async def snapshot(self, tag: str = "", *, message: str = "", quiesce: bool = False) -> model.Snapshot:
        """Keeps the machine's state of this instant until it is removed. With `quiesce` user processes are frozen in
        it, and go on in its forks when these have their own entropy. Raises AlreadyExists when the tag is taken."""
        request = pb.TakeSnapshotRequest(machine=self.id, tag=tag, quiesce=quiesce, message=message)
        with calls(self._forky.socket):
            return convert.snapshot_from_wire(await self._forky.controller.TakeSnapshot(request, timeout=MACHINE_S))

    async def renew(self, ttl_s: float = 0.0) -> model.Lease:
        """Its lease begins anew. See Pooling.renew."""
        return await self._forky.renew(self.id, ttl_s)

    async def pause(self) -> None:
        """Stops its processors; memory stays. Raises NotPossibleNow when it does not run."""
        with calls(self._forky.socket):
            message = await self._forky.controller.PauseMachine(pb.MachineRequest(machine=self.id), timeout=QUICK_S)
        self.info = convert.machine_from_wire(message)

    async def resume(self) -> None:
        """Lets a paused machine go on. Raises NotPossibleNow when it is not paused."""
        with calls(self._forky.socket):
            message = await self._forky.controller.ResumeMachine(pb.MachineRequest(machine=self.id), timeout=QUICK_S)
        self.info = convert.machine_from_wire(message)

    async def stop(self, *, force: bool = False) -> None:
        """Shuts it down and keeps its disk; `force` cuts the power instead."""
        request = pb.StopMachineRequest(machine=self.id, force=force)
        with calls(self._forky.socket):
            message = await self._forky.controller.StopMachine(request, timeout=MACHINE_S)
        self.info = convert.machine_from_wire(message)

    async def start(self) -> None:
        """Boots a stopped machine from its disk. Raises NotPossibleNow when it is not stopped."""
        with calls(self._forky.socket):
            message = await self._forky.controller.StartMachine(pb.MachineRequest(machine=self.id), timeout=MACHINE_S)
        self.info = convert.machine_from_wire(message)

    async def restore(self, snapshot: str, *, keep_tag: str = "") -> None:
        """Goes back to a snapshot (id, beginning of an id, or tag) in place: memory and disk are what they were then;
        id, name, address, ports and config stay. Then it runs. What it was is gone, unless `keep_tag` is given: then a
        snapshot with this tag is taken of it before. On failure it is as it was.
        Raises NotFound, NotPossibleNow (another image, shape or QEMU), ResourceExhausted, MachineFailed,
        GuestUnresponsive; AlreadyExists when `keep_tag` is taken."""
        request = pb.RestoreMachineRequest(machine=self.id, snapshot=snapshot, keep_tag=keep_tag)
        with calls(self._forky.socket):
            message = await self._forky.controller.RestoreMachine(request, timeout=MACHINE_S)
        self.info = convert.machine_from_wire(message)

    async def hibernate(self, *, on_progress: "OnProgress | None" = None) -> None:
        """Writes its memory to a snapshot on disk and ends its QEMU; `wake` lets it go on where it was.

        Raises NotPossibleNow when it does not run, ResourceExhausted when the disk is full; it then goes on."""
        call = self._forky.controller.HibernateMachine(pb.MachineRequest(machine=self.id), timeout=LONG_S)
        async for update in translated(self._forky.socket, call):
            if update.WhichOneof("update") == "machine":
                self.info = convert.machine_from_wire(update.machine)
            elif on_progress is not None:
                on_progress(convert.progress_from_wire(update.progress))

    async def wake(self) -> None:
        """Lets a hibernated machine go on. Raises NotPossibleNow when it is not hibernated."""
        with calls(self._forky.socket):
            message = await self._forky.controller.WakeMachine(pb.MachineRequest(machine=self.id), timeout=MACHINE_S)
        self.info = convert.machine_from_wire(message)

    async def update(self, change: model.ConfigChange) -> None:
        """Changes its network, ports or limits at once, also while it runs. Open connections that a new policy forbids
        are cut. Raises InvalidRequest, AlreadyExists (a port in use), NotPossibleNow (what this host can't do)."""
        request = pb.UpdateMachineRequest(machine=self.id, change=change_to_wire(change))
        with calls(self._forky.socket):
            message = await self._forky.controller.UpdateMachine(request, timeout=MACHINE_S)
        self.info = convert.machine_from_wire(message)

    async def remove(self) -> None:
        """Ends it and deletes its disk. Snapshots taken of it stay."""
        with calls(self._forky.socket):
            await self._forky.controller.RemoveMachine(pb.MachineRequest(machine=self.id), timeout=MACHINE_S)

    async def console(self, *, follow: bool = False) -> AsyncIterator[bytes]:
        """What its console printed, from the beginning; with `follow` until the machine is gone."""
        request = pb.ReadConsoleRequest(machine=self.id, follow=follow)
        call = self._forky.controller.ReadConsole(request, timeout=None if follow else QUICK_S)
        try:
            async for chunk in translated(self._forky.socket, call):
                yield chunk.data
        finally:
            call.cancel()

    # Commands.

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
        """A command, for streaming: `async with machine.process([...]) as process`.

        `argv[0]` is looked up in PATH; `environment` is added to the default one; `directory` "" is the user's home;
        `user` "" is root; `timeout_s` 0 is no limit; `terminal` (rows, columns) runs it on a terminal; without `stdin`
        it reads /dev/null."""
        command = Command(
            argv=argv,
            environment=environment or {},
            directory=directory,
            user=user,
            timeout_s=timeout_s,
            terminal=terminal,
            stdin=stdin,
        )
        return Process(self._forky.channel, self._forky.socket, self.id, command)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        user: str = "",
        timeout_s: float = 0.0,
        stdin: bytes | None = None,
    ) -> ExecResult:
        """Runs a command to its end and returns its exit code and all its output. See `process` for the arguments.

        A command that fails is a result, not an error. Raises NotPossibleNow when the machine does not run, and
        GuestUnresponsive."""
        process = self.process(
            argv,
            environment=environment,
            directory=directory,
            user=user,
            timeout_s=timeout_s,
            stdin=stdin is not None,
        )
        return await collect(process, stdin)

    # Files.

    @property
    def transfer(self) -> Transfer:
        """What the file verbs are made of."""
        return Transfer(self._forky.channel, self._forky.socket, self.id, self.name)

    async def upload(self, source: str | Path, path: str, *, on_bytes: OnBytes | None = None) -> Copied:
        """Copies a file or a tree into the machine: into `path` if it is a directory there, else as `path`.

        Streams, whatever the size. Raises NotFound, InvalidRequest (`path` is not absolute), NotPossibleNow."""
        return await self.transfer.upload(Path(source), path, on_bytes)

    async def download(self, path: str, target: str | Path, *, on_bytes: OnBytes | None = None) -> Copied:
        """Copies a file or a tree out of the machine: into `target` if it is a directory, else as `target`.

        The guest is not trusted: nothing is ever written outside of the target. Links that lead out of the copy and
        devices are left out and named in the result. Raises NotFound, InvalidRequest, ResourceExhausted."""
        return await self.transfer.download(path, Path(target), on_bytes)

    async def read_file(self, path: str) -> bytes:
        """The content of one file."""
        gathered = io.BytesIO()
        await self.transfer.download_into(path, gathered, None)
        return gathered.getvalue()

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Makes or replaces one file; its directory must be there."""
        await self.transfer.upload_from(io.BytesIO(data), len(data), path, mode, None)

    async def download_into(self, path: str, file: IO[bytes], *, on_bytes: OnBytes | None = None) -> int:
        """Writes the content of one file to `file`, as it comes, and returns how many bytes it was."""
        return await self.transfer.download_into(path, file, on_bytes)

    async def upload_from(
        self, file: IO[bytes], size: int, path: str, *, mode: int = 0o644, on_bytes: OnBytes | None = None
    ) -> None:
        """Makes or replaces one file from the next `size` bytes of `file`."""
        await self.transfer.upload_from(file, size, path, mode, on_bytes)
