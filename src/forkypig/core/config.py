"""What a machine's config becomes when it is changed or inherited. Pure."""

from dataclasses import fields, replace

from forkypig.core.limits_of_children import tightened, usual
from forkypig.errors import InvalidRequest, NotPossibleNow
from forkypig.model import ConfigChange, Limits, Machine, MachineConfig, PortForward, Restart, Shape

# Below it not even the answers to a name look-up arrive in time.
LEAST_BANDWIDTH_BYTES_S = 1000
MOST_PORTS = 256


def changed(config: MachineConfig, change: ConfigChange) -> MachineConfig:
    """The config with the change made. Raises InvalidRequest where the two contradict each other."""
    network = config.network
    if change.mode is not None:
        network = replace(network, mode=change.mode)
    if change.egress is not None:
        network = replace(network, egress=change.egress)
    if change.tcp is not None:
        network = replace(network, tcp=change.tcp)
    if change.bandwidth_bytes_s is not None:
        if 0 < change.bandwidth_bytes_s < LEAST_BANDWIDTH_BYTES_S:
            raise InvalidRequest(
                f"a bandwidth of {change.bandwidth_bytes_s} bytes/s is too little to work with: "
                f"use {LEAST_BANDWIDTH_BYTES_S} or more, or 0 for no limit"
            )
        network = replace(network, bandwidth_bytes_s=change.bandwidth_bytes_s or None)
    return MachineConfig(
        network=network,
        ports=_ports(config.ports, change),
        limits=with_limits(config.limits, change.limits),
        no_fork=config.no_fork if change.no_fork is None else change.no_fork,
        restart=change.restart or config.restart,
    )


def of_child(config: MachineConfig, change: ConfigChange, count: int, shape: Shape, accelerator: str) -> MachineConfig:
    """What children have of their parent's config, with the change made: all but the ports, which are the host's, and
    the restart policy: who wants one machine back does not mean its hundred children.

    Limits can only become tighter. Raises InvalidRequest."""
    if count > 1 and change.publish:
        raise InvalidRequest(f"{count} children can't publish the same port: fork one, or publish with forky update")
    check_limits(change.limits)
    limits = tightened(config.limits, change.limits, usual(shape, accelerator))
    return replace(changed(bare(config), replace(change, limits=Limits())), limits=limits)


def bare(config: MachineConfig) -> MachineConfig:
    """What of a machine's config goes over to others."""
    return replace(config, ports=(), restart=Restart.NO)


def check_may_fork(machine: Machine) -> None:
    """Raises NotPossibleNow for a machine that was marked not to be forked."""
    if machine.config.no_fork:
        raise NotPossibleNow(
            f"machine «{machine.name}» is marked --no-fork, so it is neither forked nor kept as a snapshot: "
            f"if you mean it, allow it with forky update {machine.name} --allow-fork"
        )


def with_limits(limits: Limits, asked: Limits) -> Limits:
    """The limits with those replaced that are asked for."""
    wanted = {field.name: getattr(asked, field.name) for field in fields(asked)}
    check_limits(asked)
    return replace(limits, **{name: value for name, value in wanted.items() if value is not None})


def check_limits(limits: Limits) -> None:
    """Raises InvalidRequest for a limit that no machine can live with."""
    least = {"cpus": 0.01, "memory_mib": 64, "pids": 16, "io_mib_s": 1}
    for name, value in least.items():
        asked = getattr(limits, name)
        if asked is not None and asked < value:
            raise InvalidRequest(f"a limit of {asked:g} {_WORDS[name]} is too little: use {value:g} or more")


_WORDS = {"cpus": "CPUs", "memory_mib": "MiB of memory", "pids": "threads", "io_mib_s": "MiB/s of disk"}


def _ports(ports: tuple[PortForward, ...], change: ConfigChange) -> tuple[PortForward, ...]:
    by_host = {port.host_side: port for port in ports}
    for port in change.unpublish:
        if by_host.pop(port.host_side, None) is None:
            published = ", ".join(str(p) for p in ports) or "none"
            raise InvalidRequest(
                f"port {port.host_port}/{port.protocol} of {port.host_address} is not published by this machine; "
                f"published are: {published}"
            )
    for port in change.publish:
        if port.host_side in by_host:
            raise InvalidRequest(f"port {port.host_port}/{port.protocol} is published twice: name it once")
        by_host[port.host_side] = port
    if len(by_host) > MOST_PORTS:
        raise InvalidRequest(f"a machine can publish {MOST_PORTS} ports, not {len(by_host)}")
    return tuple(by_host.values())
