"""A machine as hostd holds it: its record, its QEMU process, its agent's channel, and the one operation under way."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import structlog

from forkypig.errors import Busy, GuestUnresponsive, NotPossibleNow, ResourceExhausted
from forkypig.guest.channel import GuestChannel
from forkypig.hostd.cgroups.cgroups import Group
from forkypig.hostd.records import MachineRecord
from forkypig.model import Machine, MachineConfig, MachineId, MachineState, SnapshotId
from forkypig.net.slot import Slot
from forkypig.qemu.process import Process

log = structlog.get_logger()

# An agent that is there answers at once, or within seconds where every core is taken.
_FINDING_S = 15.0


class LiveMachine:
    """One machine. Its state changes in `note` only, which logs; `update` saves too, and tells the watchers."""

    def __init__(
        self,
        record: MachineRecord,
        save: Callable[["LiveMachine"], None],
        process: Process | None = None,
        channel: GuestChannel | None = None,
    ) -> None:
        self.record = record
        self.process = process
        self.channel = channel
        self.group: Group | None = None  # its cgroup, while a process runs
        self.slot: Slot | None = None  # its network namespace; kept while it is stopped
        self.finding_agent: asyncio.Task[Any] | None = None  # after adoption, or a move that failed
        self.removed = asyncio.Event()
        self.stalled = ""  # what it stands still for, although it is to run
        self._save = save
        self._operation = ""

    @property
    def id(self) -> MachineId:
        return self.record.machine.id

    @property
    def name(self) -> str:
        return self.record.machine.name

    @property
    def tenant(self) -> str:
        return self.record.machine.tenant

    @property
    def state(self) -> MachineState:
        return self.record.machine.state

    @property
    def memory_bytes(self) -> int:
        return self.record.machine.shape.memory_mib << 20

    def view(self) -> Machine:
        """The machine as others see it now."""
        pid = self.process.pid if self.process is not None else None
        address = str(self.slot.address) if self.slot is not None else None
        return replace(self.record.machine, qemu_pid=pid, operation=self._operation, address=address)

    def update(self, state: MachineState | None = None, failure: str = "", **changes: Any) -> None:
        """Changes the record; `changes` are other fields of MachineRecord than `machine`."""
        self.note(state, failure, **changes)
        self._save(self)

    def note(self, state: MachineState | None = None, failure: str = "", **changes: Any) -> None:
        """As `update`, for who calls `save` a moment later, since somebody waits: until then a hostd that dies leaves
        the record as it was, and the next one asks QEMU."""
        machine = self.record.machine
        if state is not None and state is not machine.state:
            log.info("machine", id=self.id, name=self.name, was=machine.state.value, now=state.value, why=failure)
            machine = replace(machine, state=state, failure=failure)
        self.record = replace(self.record, machine=machine, **changes)

    def stall(self, why: str) -> None:
        """It stands still, and for what; "": it goes on."""
        self.stalled = why
        with contextlib.suppress(ResourceExhausted):  # there may be no room for the record either
            self.update(MachineState.PAUSED if why else MachineState.RUNNING)

    def configured(self, config: MachineConfig) -> None:
        """Its config is another now."""
        self.record = replace(self.record, machine=replace(self.record.machine, config=config))
        self._save(self)

    def stand_on(self, snapshot: SnapshotId, **changes: Any) -> None:
        """The machine stands on another snapshot now. Not saved: after a split memory must be right before anything
        can fail, and the disk may be full."""
        self.record = replace(self.record, machine=replace(self.record.machine, snapshot=snapshot), **changes)

    def save(self) -> None:
        """Writes the record down and tells the watchers."""
        self._save(self)

    @contextlib.contextmanager
    def operation(self, name: str, *allowed: MachineState) -> Iterator[None]:
        """One operation at a time: raises Busy while another runs, NotPossibleNow in other states than `allowed`."""
        if self._operation:
            raise Busy(f"machine «{self.name}»", self._operation)
        if self.state not in allowed:
            raise NotPossibleNow(self._not_possible(name, allowed))
        self._operation = name
        try:
            yield
        finally:
            self._operation = ""

    def _not_possible(self, name: str, allowed: tuple[MachineState, ...]) -> str:
        wanted = " or ".join(state.value for state in allowed)
        sentence = f"machine «{self.name}» is {self.state.value}; {name} needs it to be {wanted}"
        if self.state is MachineState.FAILED and self.record.machine.failure:
            sentence += f" (it failed: {self.record.machine.failure})"
        elif self.state is MachineState.STOPPED:
            sentence += f": forky start {self.name}"
        elif self.state is MachineState.HIBERNATED:
            sentence += f": forky wake {self.name}"
        elif self.state is MachineState.PAUSED:
            sentence += f": forky resume {self.name}"
        return sentence

    def running_process(self) -> Process:
        """Its QEMU. Raises NotPossibleNow when none runs."""
        if self.process is None:
            verb = "wake" if self.state is MachineState.HIBERNATED else "start"
            raise NotPossibleNow(f"machine «{self.name}» has no QEMU process: forky {verb} {self.name}")
        return self.process

    def agent(self) -> GuestChannel:
        """The channel to its agent. Raises when the machine does not run or its agent was lost."""
        if self.stalled:
            raise NotPossibleNow(f"machine «{self.name}» stands still, {self.stalled}: then it goes on by itself")
        if self.state is not MachineState.RUNNING:
            raise NotPossibleNow(self._not_possible("this", (MachineState.RUNNING,)))
        if self.channel is None:
            raise GuestUnresponsive(
                f"the agent of machine «{self.name}» does not answer: look at `forky logs {self.name}`, "
                f"or restart it with forky stop --force and forky start"
            )
        return self.channel

    async def ready_agent(self) -> GuestChannel:
        """As `agent`; while the agent is looked for, waits for the outcome."""
        if self.channel is None and self.finding_agent is not None:
            await asyncio.wait({self.finding_agent}, timeout=_FINDING_S)
        return self.agent()

    async def close_channel(self) -> None:
        """Leaves the agent's socket to whoever opens it next: QEMU has one caller at a time."""
        if (finding := self.finding_agent) is not None and not finding.done():
            finding.cancel()
            await asyncio.wait({finding})
        channel, self.channel = self.channel, None
        if channel is not None:
            await channel.close()

    async def leave_group(self) -> None:
        """Its last process has ended: removes its cgroup."""
        group, self.group = self.group, None
        if group is not None:
            await asyncio.to_thread(group.remove)
