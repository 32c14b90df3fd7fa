"""What `status` and `doctor` answer with."""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forkypig.v1.common_pb2 import Daemon as DaemonMessage
    from forkypig.v1.common_pb2 import MemoryTiers
    from forkypig.v1.controller_pb2 import GetStatusResponse


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that runs. `started_us` is microseconds since the epoch, 0 when it could not be asked."""

    pid: int
    version: str = ""
    started_us: int = 0


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where the memory of snapshots is, in bytes, from the fastest to the slowest."""

    frozen_bytes: int  # in frozen processes: not packed yet
    cached_bytes: int  # in the page cache: given back when the host needs it
    stored_bytes: int  # in packs on disk, compressed
    chunks: int  # in them


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One instance of Forky Pig as it is now; a daemon that does not run is None."""

    home: Path
    controller: Daemon | None = None
    hostd: Daemon | None = None
    pager: Daemon | None = None
    rest: Daemon | None = None  # the REST API, of this computer's own home alone; None also where nobody asked for it
    rest_address: str = ""
    rest_error: str = ""
    controller_error: str = ""  # why it can't be asked although it runs
    hostd_error: str = ""
    pager_error: str = ""
    accelerator: str | None = None
    accelerator_reason: str = ""
    qemu_version: str = ""
    network: str | None = None  # "nat", "user" or "none"
    network_reason: str = ""
    machines: int = 0
    snapshots: int = 0
    tiers: Tiers | None = None  # None: the pager can't be asked

    @property
    def running(self) -> bool:
        """Whether all three daemons run."""
        return None not in (self.controller, self.hostd, self.pager)

    def with_answer(self, answer: "GetStatusResponse") -> "Status":
        """This, with what the controller says. A daemon that the controller can't reach may still run."""
        return replace(
            self,
            controller=_daemon(answer.controller) or self.controller,
            hostd=_daemon(answer.hostd) or self.hostd,
            pager=_daemon(answer.pager) or self.pager,
            hostd_error=answer.hostd_error,
            pager_error=answer.pager_error,
            accelerator=answer.accelerator or None,
            accelerator_reason=answer.accelerator_reason,
            qemu_version=answer.qemu_version,
            network=answer.network or None,
            network_reason=answer.network_reason,
            machines=answer.machines,
            snapshots=answer.snapshots,
            tiers=_tiers(answer.tiers) if answer.HasField("tiers") else None,
        )


def _tiers(message: "MemoryTiers") -> Tiers:
    return Tiers(message.frozen_bytes, message.cached_bytes, message.stored_bytes, message.chunks)


def _daemon(message: "DaemonMessage") -> Daemon | None:
    return Daemon(message.pid, message.version, message.started_us) if message.pid else None


class Verdict(Enum):
    """How a requirement is met."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement: what was found, and what to do about it (empty when all is well)."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
