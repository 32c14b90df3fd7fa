"""The way in: one connection to the controller of one home.

async with Forky() as forky:
    web = await forky.run(name="web")
    children = (await web.fork(3)).children
"""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc

from forkypig import errors, model
from forkypig.sdk import local
from forkypig.sdk.access import Access
from forkypig.sdk.address import Endpoint, endpoint, identity
from forkypig.sdk.bisect import Bisected, OnTrial, bisect
from forkypig.sdk.connection import LONG_S, MACHINE_S, QUICK_S, calls, open_channel, translated
from forkypig.sdk.diff import Diff, diff
from forkypig.sdk.machine import UNCHANGED, Fork, Machine
from forkypig.sdk.observe import Observing
from forkypig.sdk.pools import Pooling
from forkypig.sdk.status import Check, Status, Verdict
from forkypig.sdk.store import Storing
from forkypig.sdk.tenants import Tenancy
from forkypig.v1 import common_pb2, controller_pb2_grpc
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire import convert
from forkypig.wire.config import change_to_wire, options_to_wire

if TYPE_CHECKING:
    from forkypig.v1.controller_pb2_grpc import ControllerAsyncStub

OnProgress = Callable[[model.Progress], None]
WrapChannel = Callable[[grpc.aio.Channel], grpc.aio.Channel]
_EMPTY = common_pb2.Empty()
_PAGE = 1000  # an answer of some 300 KiB
_EVENTS_PAGE = 1000


class Forky(Observing, Storing, Access, Tenancy, Pooling):
    """A connection to one instance of Forky Pig; use as an asynchronous context manager."""

    def __init__(
        self,
        home: str | Path | None = None,
        *,
        start: bool = True,
        on_progress: OnProgress | None = None,
        controller: str | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        tenant: str | None = None,
        wrap_channel: WrapChannel | None = None,
    ) -> None:
        """`home` None: FORKY_HOME, or the default. With `start` the daemons are started when they do not run;
        `on_progress` is told of it.

        `controller`: another than the home's, as HOST:PORT (with TLS), unix:/PATH, or http://HOST:PORT on loopback.
        `token`, `ca` (whom to believe), `certificate` and `key` (PEM files), `tenant` (to act in, as the operator) and
        it are FORKY_CONTROLLER, FORKY_TOKEN, FORKY_CA, … where they are None. `wrap_channel` puts something around
        gRPC's own channel, for whoever passes the calls of others on.
        Raises InvalidRequest when the home or an address can't be used, Unauthenticated for what can't be a token."""
        self._wrap_channel = wrap_channel
        self.place = local.place(home)
        named = os.environ.get("FORKY_CONTROLLER", "") if controller is None and home is None else controller
        self._identity = identity(token, tenant)
        self.socket: Endpoint = endpoint(named, ca, certificate, key) if named else self.place.socket("controller")
        self.is_remote = bool(named)
        self._start, self._on_progress = start, on_progress
        self._channel: grpc.aio.Channel | None = None
        self._stub: ControllerAsyncStub | None = None

    async def connect(self) -> Self:
        """Starts the daemons if need be, and opens the channel.

        Raises HostUnreachable when they do not run, or do not start."""
        if self._channel is not None:
            return self
        if self.is_remote:
            pass
        elif self._start and not local.all_run(self.place):
            await local.up(self.place, self._on_progress)
        elif isinstance(self.socket, Path) and not self.socket.exists():
            raise errors.HostUnreachable(f"nothing runs in {self.place.home}: start it with `forky up`")
        self._channel = open_channel(self.socket, self._identity, self._wrap_channel)
        self._stub = controller_pb2_grpc.ControllerStub(self._channel)
        return self

    async def close(self) -> None:
        """Closes the channel and with it all that still runs over it. Machines and daemons go on."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The open channel. Raises NotPossibleNow before `connect`."""
        if self._channel is None:
            raise errors.NotPossibleNow("not connected: use `async with Forky() as forky`, or call connect() first")
        return self._channel

    @property
    def controller(self) -> "ControllerAsyncStub":
        """The controller's stub, for the handles. Raises NotPossibleNow before `connect`."""
        if self._stub is None:
            raise errors.NotPossibleNow("not connected: use `async with Forky() as forky`, or call connect() first")
        return self._stub

    # Machines.

    async def run(
        self,
        image: str = "",
        *,
        name: str = "",
        cpus: int = 0,
        memory_mib: int = 0,
        disk_mib: int = 0,
        cold_boot: bool = False,
        snapshot: str = "",
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
        on_progress: OnProgress | None = None,
    ) -> Machine:
        """Makes a machine from an image ("" is the default one, built if it is missing) and waits until it is ready.

        `snapshot` (id, beginning of an id, or tag): from this one instead; it then has its shape, and its machine's
        config but for the ports and `restart`, with `config` as what differs.

        The first run of an image and shape boots and keeps a template; later ones start from it in milliseconds,
        unless `cold_boot`. Zeros are defaults, "" lets a name be chosen. `config`: network, ports, limits, as far as
        they are not to be the defaults. With `ttl_s` it is removed when it was not used (exec, files, terminals, its
        forks and snapshots, what else is done to it, `renew`) for so many seconds.
        Raises AlreadyExists, InvalidRequest, NotFound, ResourceExhausted, MachineFailed, GuestUnresponsive."""
        for what, value in (("CPUs", cpus), ("MiB of memory", memory_mib), ("MiB of disk", disk_mib)):
            if not 0 <= value < 1 << 31:
                raise errors.InvalidRequest(f"{value} {what} can't be had: use a positive number, or 0 for the default")
        shape = common_pb2.Shape(cpus=cpus, memory_mib=memory_mib, disk_mib=disk_mib)
        request = pb.RunMachineRequest(
            image=image,
            name=name,
            shape=shape,
            cold_boot=cold_boot,
            snapshot=snapshot,
            config=change_to_wire(config),
            ttl_s=ttl_s,
        )
        call = self.controller.RunMachine(request, timeout=LONG_S)
        async for update in translated(self.socket, call):
            if update.WhichOneof("update") == "result":
                made = Machine(self, convert.machine_from_wire(update.result.machine), update.result.ready_ms)
                made.pool = update.result.pool
                return made
            if on_progress is not None:
                on_progress(convert.progress_from_wire(update.progress))
        raise errors.InternalError("the run ended without a machine: the controller's log says more")

    async def fork(
        self,
        source: str,
        count: int = 1,
        *,
        name: str = "",
        paused: bool = False,
        quiesce: bool = False,
        forget: Sequence[str] = (),
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
    ) -> Fork:
        """Makes `count` children (1 to 1000) of a machine or a snapshot, given by id, name or tag.

        See `Machine.fork`. Raises NotFound besides."""
        if not 1 <= count <= 1000:
            raise errors.InvalidRequest(f"{count} children are not possible: ask for 1 to 1000")
        options = model.ForkOptions(paused=paused, quiesce=quiesce, forget=tuple(forget))
        request = pb.ForkRequest(
            source=source,
            count=count,
            name_prefix=name,
            options=options_to_wire(options),
            config=change_to_wire(config),
            ttl_s=ttl_s,
        )
        with calls(self.socket):
            message = await self.controller.Fork(request, timeout=LONG_S)
        result = convert.fork_result_from_wire(message)
        children = tuple(Machine(self, child.machine, child.ready_ms) for child in result.children)
        return Fork(result.snapshot, result.parent, result.pause_ms, children)

    async def get(self, machine: str) -> Machine:
        """The machine of this id or name. Raises NotFound."""
        with calls(self.socket):
            message = await self.controller.GetMachine(pb.MachineRequest(machine=machine), timeout=QUICK_S)
        return Machine(self, convert.machine_from_wire(message))

    async def list(self) -> Sequence[Machine]:
        """All machines, oldest first."""
        found: dict[str, model.Machine] = {}
        token = ""
        while True:
            request = pb.ListMachinesRequest(page_size=_PAGE, page_token=token)
            with calls(self.socket):
                answer = await self.controller.ListMachines(request, timeout=QUICK_S)
            found |= {message.id: convert.machine_from_wire(message) for message in answer.machines}
            if not (token := answer.next_page_token):
                break
        ordered = sorted(found.values(), key=lambda info: (info.created_us, info.id))
        return [Machine(self, info) for info in ordered]

    # Snapshots.

    async def snapshots(self) -> Sequence[model.Snapshot]:
        """All snapshots, oldest first."""
        found: dict[str, model.Snapshot] = {}
        token = ""
        while True:
            request = pb.ListSnapshotsRequest(page_size=_PAGE, page_token=token)
            with calls(self.socket):
                answer = await self.controller.ListSnapshots(request, timeout=QUICK_S)
            found |= {message.id: convert.snapshot_from_wire(message) for message in answer.snapshots}
            if not (token := answer.next_page_token):
                break
        return sorted(found.values(), key=lambda each: (each.created_us, each.id))

    async def get_snapshot(self, snapshot: str) -> model.Snapshot:
        """The snapshot of this id, beginning of an id, or tag. Raises NotFound, InvalidRequest (several begin so)."""
        with calls(self.socket):
            message = await self.controller.GetSnapshot(pb.SnapshotRequest(snapshot=snapshot), timeout=QUICK_S)
        return convert.snapshot_from_wire(message)

    async def history(self, source: str) -> Sequence[model.Snapshot]:
        """What a machine or a snapshot stands on, newest first; a snapshot is the first of its own. Raises NotFound."""
        with calls(self.socket):
            answer = await self.controller.GetHistory(pb.HistoryRequest(source=source), timeout=QUICK_S)
        return [convert.snapshot_from_wire(message) for message in answer.snapshots]

    async def tag(self, snapshot: str, tag: str, *, force: bool = False) -> model.Snapshot:
        """Gives a snapshot a tag; it then stays until it is removed. `force`: takes the tag from another snapshot, or
        replaces one that this snapshot has. Raises AlreadyExists, NotPossibleNow (a template, a tag it has)."""
        request = pb.TagSnapshotRequest(snapshot=snapshot, tag=tag, force=force)
        with calls(self.socket):
            return convert.snapshot_from_wire(await self.controller.TagSnapshot(request, timeout=QUICK_S))

    async def untag(self, tag: str) -> model.Snapshot:
        """Takes a tag away; its snapshot stays. Raises NotFound."""
        with calls(self.socket):
            message = await self.controller.UntagSnapshot(pb.UntagSnapshotRequest(tag=tag), timeout=QUICK_S)
        return convert.snapshot_from_wire(message)

    async def bisect(
        self,
        source: str,
        argv: Sequence[str],
        *,
        good: str,
        bad: str = "",
        timeout_s: float = 0.0,
        on_trial: OnTrial | None = None,
    ) -> Bisected:
        """Finds the first bad snapshot of a machine's or a snapshot's history, after `good` and up to `bad` (""; the
        newest): runs a command in a child of the middle one, and so on.

        Exit code 0 is good, 125 says nothing, others are bad. The children are removed in any case. `on_trial` is told
        of each. Raises InvalidRequest (`good` is no ancestor of `bad`; the command is not there), NotFound."""
        return await bisect(self, source, good, bad, argv, timeout_s, on_trial)

    async def pack(self, snapshot: str, *, on_progress: OnProgress | None = None) -> model.Snapshot:
        """Writes a snapshot to the store now and waits until it is durable; one that is already is fine.

        Kept snapshots are packed by themselves, behind what machines do. Raises NotFound, ResourceExhausted."""
        request = pb.SnapshotRequest(snapshot=snapshot)
        async for message in translated(self.socket, self.controller.PackSnapshot(request, timeout=LONG_S)):
            if on_progress is not None:
                on_progress(convert.progress_from_wire(message))
        return await self.get_snapshot(snapshot)

    async def diff(
        self, before: str, after: str, *, patch: bool = False, on_progress: OnProgress | None = None
    ) -> Diff:
        """What changed from one snapshot (id, beginning of an id, tag; or a machine: as it is now) to another.

        A child of each is started, looked into and removed; both snapshots are packed. What children are given anew
        (hostname, machine-id) is left out. `patch`: with the changes of text files. Raises NotFound, InvalidRequest
        (two sizes of memory), and what a fork can raise."""
        return await diff(self, before, after, patch, on_progress)

    async def remove_snapshot(self, snapshot: str) -> None:
        """Deletes a snapshot, given by id or tag. Raises NotFound, and NotPossibleNow while something stands on it."""
        with calls(self.socket):
            await self.controller.RemoveSnapshot(pb.SnapshotRequest(snapshot=snapshot), timeout=MACHINE_S)

    # Images.

    async def images(self) -> Sequence[model.Image]:
        """All images, oldest first."""
        with calls(self.socket):
            answer = await self.controller.ListImages(_EMPTY, timeout=QUICK_S)
        return sorted(map(convert.image_from_wire, answer.images), key=lambda image: (image.created_us, image.id))

    async def get_image(self, image: str) -> model.Image:
        """The image of this id or name. Raises NotFound."""
        with calls(self.socket):
            return convert.image_from_wire(
                await self.controller.GetImage(pb.ImageRequest(image=image), timeout=QUICK_S)
            )

    async def build_image(
        self, name: str = "", *, rebuild: bool = False, on_progress: OnProgress | None = None
    ) -> model.Image:
        """Builds the default image, or returns the one that is there from the same recipe, unless `rebuild`.

        Takes about a minute. Raises ResourceExhausted, NotPossibleNow (a tool is missing)."""
        call = self.controller.BuildImage(pb.BuildImageRequest(name=name, rebuild=rebuild), timeout=LONG_S)
        async for update in translated(self.socket, call):
            if update.WhichOneof("update") == "image":
                return convert.image_from_wire(update.image)
            if on_progress is not None:
                on_progress(convert.progress_from_wire(update.progress))
        raise errors.InternalError("the build ended without an image: the daemons' logs say more")

    async def update_image(self, image: str, *, forget_files: Sequence[str]) -> model.Image:
        """Names the files (absolute paths; directories with all that is in them) that forks of the image's machines
        don't have: they are overwritten and removed in each child. Raises NotFound, InvalidRequest."""
        request = pb.UpdateImageRequest(image=image, forget_files=forget_files)
        with calls(self.socket):
            return convert.image_from_wire(await self.controller.UpdateImage(request, timeout=QUICK_S))

    async def remove_image(self, image: str) -> None:
        """Deletes an image, given by id or name. Raises NotFound, and NotPossibleNow while machines stand on it."""
        with calls(self.socket):
            await self.controller.RemoveImage(pb.ImageRequest(image=image), timeout=MACHINE_S)

    # The instance.

    async def status(self) -> Status:
        """What runs, on which accelerator and why."""
        if not self.is_remote:
            return await local.status(self.place)
        with calls(self.socket):
            answer = await self.controller.GetStatus(_EMPTY, timeout=QUICK_S)
        return Status(home=Path(answer.home)).with_answer(answer)

    async def remote_status(self) -> Status:
        """As `status`, of what the controller says alone: for callers that are on another computer than it."""
        with calls(self.socket):
            answer = await self.controller.GetStatus(_EMPTY, timeout=QUICK_S)
        return Status(home=Path(answer.home)).with_answer(answer)

    async def doctor(self) -> Sequence[Check]:
        """Every requirement, whether it holds, and how to mend it."""
        with calls(self.socket):
            # Probes KVM by booting a guest, which may take its whole time limit.
            answer = await self.controller.Doctor(_EMPTY, timeout=MACHINE_S)
        return [
            Check(check.name, _VERDICTS.get(check.verdict, Verdict.WARNING), check.detail, check.remedy)
            for check in answer.checks
        ]

    async def events(self, *, after_sequence: int = 0, limit: int = 0) -> AsyncIterator[model.Event]:
        """What happened, oldest first, after the event of this sequence number; at most `limit` (0: all)."""
        left = limit or None
        while left is None or left > 0:
            page = _EVENTS_PAGE if left is None else min(left, _EVENTS_PAGE)
            request = pb.ListEventsRequest(after_sequence=after_sequence, limit=page)
            with calls(self.socket):
                answer = await self.controller.ListEvents(request, timeout=QUICK_S)
            for event in answer.events:
                after_sequence = max(after_sequence, event.sequence)
                yield convert.event_from_wire(event)
            if not answer.events:
                return
            if left is not None:
                left -= len(answer.events)


_VERDICTS = {
    common_pb2.Check.VERDICT_OK: Verdict.OK,
    common_pb2.Check.VERDICT_WARNING: Verdict.WARNING,
    common_pb2.Check.VERDICT_FAILED: Verdict.FAILED,
}
