"""A machine's config and the options of a fork, model <-> protobuf."""

from ipaddress import IPv4Address, IPv4Network

from forkypig import model
from forkypig.errors import InvalidRequest
from forkypig.v1 import common_pb2 as pb

_MODES = {mode: pb.NetworkMode.Value(f"NETWORK_MODE_{mode.name}") for mode in model.NetworkMode}
_MODES_BACK = {number: mode for mode, number in _MODES.items()}
_RESTART = {each: pb.RestartPolicy.Value(f"RESTART_POLICY_{each.name}") for each in model.Restart}
_RESTART_BACK = {number: each for each, number in _RESTART.items()}
_TCP = {mode: pb.TcpMode.Value(f"TCP_MODE_{mode.name}") for mode in model.TcpMode}
_TCP_BACK = {number: mode for mode, number in _TCP.items()}


def config_to_wire(config: model.MachineConfig) -> pb.MachineConfig:
    network = config.network
    return pb.MachineConfig(
        mode=_MODES[network.mode],
        egress=_egress_to_wire(network.egress),
        bandwidth_bytes_s=network.bandwidth_bytes_s or 0,
        tcp=_TCP[network.tcp],
        ports=[_port_to_wire(port) for port in config.ports],
        limits=_limits_to_wire(config.limits),
        no_fork=config.no_fork,
        restart=_RESTART[config.restart],
    )


def config_from_wire(message: pb.MachineConfig) -> model.MachineConfig:
    """Raises InvalidRequest for addresses and ports that are none. What an older peer leaves out is the default."""
    usual = model.NetworkPolicy()
    return model.MachineConfig(
        network=model.NetworkPolicy(
            mode=_MODES_BACK.get(message.mode, usual.mode),
            egress=_egress_from_wire(message.egress) if message.HasField("egress") else usual.egress,
            bandwidth_bytes_s=message.bandwidth_bytes_s or None,
            tcp=_TCP_BACK.get(message.tcp, usual.tcp),
        ),
        ports=tuple(_port_from_wire(port) for port in message.ports),
        limits=_limits_from_wire(message.limits),
        no_fork=message.no_fork,
        restart=_RESTART_BACK.get(message.restart, model.Restart.NO),
    )


def change_to_wire(change: model.ConfigChange) -> pb.ConfigChange:
    return pb.ConfigChange(
        mode=_MODES[change.mode] if change.mode else pb.NETWORK_MODE_UNSPECIFIED,
        egress=_egress_to_wire(change.egress) if change.egress is not None else None,
        bandwidth_bytes_s=change.bandwidth_bytes_s,
        tcp=_TCP[change.tcp] if change.tcp else pb.TCP_MODE_UNSPECIFIED,
        publish=[_port_to_wire(port) for port in change.publish],
        unpublish=[_port_to_wire(port) for port in change.unpublish],
        limits=_limits_to_wire(change.limits),
        no_fork=change.no_fork,
        restart=_RESTART[change.restart] if change.restart else pb.RESTART_POLICY_UNSPECIFIED,
    )


def change_from_wire(message: pb.ConfigChange) -> model.ConfigChange:
    """Raises InvalidRequest for what no version of ours sends."""
    if message.mode not in (*_MODES_BACK, 0) or message.tcp not in (*_TCP_BACK, 0):
        raise InvalidRequest("the network mode or the TCP mode is none that this version knows: upgrade the daemons")
    return model.ConfigChange(
        mode=_MODES_BACK.get(message.mode),
        egress=_egress_from_wire(message.egress) if message.HasField("egress") else None,
        bandwidth_bytes_s=message.bandwidth_bytes_s if message.HasField("bandwidth_bytes_s") else None,
        tcp=_TCP_BACK.get(message.tcp),
        publish=tuple(_port_from_wire(port) for port in message.publish),
        unpublish=tuple(_port_from_wire(port, whole=False) for port in message.unpublish),
        limits=_limits_from_wire(message.limits),
        no_fork=message.no_fork if message.HasField("no_fork") else None,
        restart=_RESTART_BACK.get(message.restart),
    )


def options_to_wire(options: model.ForkOptions) -> pb.ForkOptions:
    return pb.ForkOptions(
        paused=options.paused, quiesce=options.quiesce, forget=options.forget, background=options.background
    )


def options_from_wire(message: pb.ForkOptions) -> model.ForkOptions:
    return model.ForkOptions(
        paused=message.paused,
        quiesce=message.quiesce,
        forget=tuple(message.forget),
        background=message.background,
    )


def _egress_to_wire(egress: model.Egress) -> pb.Egress:
    if egress.allowed is None:
        return pb.Egress(anywhere=True)
    return pb.Egress(networks=[str(network) for network in egress.allowed])


def _egress_from_wire(message: pb.Egress) -> model.Egress:
    if message.anywhere:
        return model.Egress()
    try:
        return model.Egress(tuple(IPv4Network(network) for network in message.networks))
    except ValueError as error:
        raise InvalidRequest(f"{error}: egress takes IPv4 networks like 10.0.0.0/8") from error


def _port_to_wire(port: model.PortForward) -> pb.PortForward:
    return pb.PortForward(
        host_port=port.host_port, guest_port=port.guest_port, protocol=port.protocol, host_address=port.host_address
    )


def _port_from_wire(message: pb.PortForward, *, whole: bool = True) -> model.PortForward:
    try:
        address = str(IPv4Address(message.host_address or "0.0.0.0"))  # noqa: S104
    except ValueError as error:
        raise InvalidRequest(f"«{message.host_address}» is no IPv4 address to publish a port on") from error
    protocol = message.protocol or "tcp"
    if protocol not in ("tcp", "udp"):
        raise InvalidRequest(f"a published port is tcp or udp, not «{protocol}»")
    for port in (message.host_port, message.guest_port) if whole else (message.host_port,):
        if not 1 <= port <= 65535:
            raise InvalidRequest(f"{port} is not a port: they go from 1 to 65535")
    return model.PortForward(message.host_port, message.guest_port, protocol, address)


def _limits_to_wire(limits: model.Limits) -> pb.Limits:
    return pb.Limits(cpus=limits.cpus, memory_mib=limits.memory_mib, pids=limits.pids, io_mib_s=limits.io_mib_s)


def _limits_from_wire(message: pb.Limits) -> model.Limits:
    return model.Limits(
        cpus=message.cpus if message.HasField("cpus") else None,
        memory_mib=message.memory_mib if message.HasField("memory_mib") else None,
        pids=message.pids if message.HasField("pids") else None,
        io_mib_s=message.io_mib_s if message.HasField("io_mib_s") else None,
    )
