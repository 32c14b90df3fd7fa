"""What surrounds a machine and can be changed while it runs, and how a fork is done. Standard library only."""

from dataclasses import dataclass
from enum import Enum

from forkypig.model.limits import Limits
from forkypig.model.network import Egress, NetworkMode, NetworkPolicy, PortForward, TcpMode


class Restart(Enum):
    """What becomes of a machine that was running and whose QEMU is gone when hostd starts."""

    NO = "no"  # it has failed, and says so
    ALWAYS = "always"  # it comes back from its last durable snapshot, or else boots from its disk


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """Network, limits and the like of one machine. Children inherit all but the ports, which are the host's, and
    `restart`."""

    network: NetworkPolicy = NetworkPolicy()
    ports: tuple[PortForward, ...] = ()
    limits: Limits = Limits()
    no_fork: bool = False  # it refuses to be forked
    restart: Restart = Restart.NO


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """Changes to a config; None and empty leave what is there."""

    mode: NetworkMode | None = None
    egress: Egress | None = None
    bandwidth_bytes_s: int | None = None  # 0: no limit
    tcp: TcpMode | None = None
    publish: tuple[PortForward, ...] = ()
    unpublish: tuple[PortForward, ...] = ()  # known by their host's side; guest_port is not looked at
    limits: Limits = Limits()
    no_fork: bool | None = None
    restart: Restart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkOptions:
    """How a fork is done, besides its children."""

    paused: bool = False  # hand the children out paused
    quiesce: bool = False  # freeze the guest's user processes before the split, until each has its own entropy
    forget: tuple[str, ...] = ()  # environment variables whose values are gone in children
    background: bool = False  # one after the other, and behind everything else that wants the CPU
