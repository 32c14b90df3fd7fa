"""The options for what surrounds a machine, which several commands share; and forky update and port."""

from typing import TYPE_CHECKING, Annotated

import typer

from forkypig.cli import documents, printing, sizes
from forkypig.cli.arguments import MachineName, parameter, size
from forkypig.cli.runtime import connected
from forkypig.model import ConfigChange, Egress, Limits, NetworkMode, PortForward, Restart, TcpMode

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

app = typer.Typer()


_egress = parameter(Egress.parse)
_port = parameter(PortForward.parse)


def _host_side(text: str) -> PortForward:
    """[ADDRESS:]HOST[:GUEST][/udp]"""
    port, slash, protocol = text.partition("/")
    whole = port if port.count(":") - ("." in port) == 1 else f"{port}:1"
    return _port(whole + slash + protocol)


def _bandwidth(text: str) -> int:
    if text in ("0", "none"):
        return 0
    try:
        return sizes.bytes_of(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error} per second; none for no limit") from error


Network = Annotated[
    NetworkMode | None,
    typer.Option(
        "--network", help="nat: the outside and other machines; isolated: only other machines; none: nothing."
    ),
]
EgressOption = Annotated[
    Egress | None,
    typer.Option(
        "--egress", parser=_egress, metavar="allow|deny|CIDR,…", help="Where connections that begin in it may go."
    ),
]
Bandwidth = Annotated[
    int | None,
    typer.Option("--bandwidth", parser=_bandwidth, metavar="SIZE", help="Per second, each way: 500K, 10M; or none."),
]
Publish = Annotated[
    list[PortForward] | None,
    typer.Option("-p", "--publish", parser=_port, metavar="HOST:GUEST", help="A port of the host that leads into it."),
]
Unpublish = Annotated[
    list[PortForward] | None,
    typer.Option("--unpublish", parser=_host_side, metavar="HOST", help="Close a published port."),
]
CpuLimit = Annotated[float | None, typer.Option("--cpu-limit", metavar="N", help="Cores' worth of the host's time.")]
MemoryLimit = Annotated[
    int | None, typer.Option("--memory-limit", parser=size, metavar="SIZE", help="Host memory, QEMU's own included.")
]
PidsLimit = Annotated[int | None, typer.Option("--pids-limit", metavar="N", help="Threads of its QEMU.")]
IoLimit = Annotated[
    int | None, typer.Option("--io-limit", parser=size, metavar="SIZE", help="Disk, per second, each way: 50M.")
]
RestartOption = Annotated[
    Restart | None,
    typer.Option(
        "--restart", help="always: after a reboot it comes back from its last durable snapshot, or else boots."
    ),
]
Tcp = Annotated[
    TcpMode | None,
    typer.Option(
        "--tcp", help="TCP connections that children inherit: reset at once, or silent.", show_default="reset"
    ),
]


def limits(
    cpus: float | None = None, memory_mib: int | None = None, pids: int | None = None, io_mib_s: int | None = None
) -> Limits:
    return Limits(cpus=cpus, memory_mib=memory_mib, pids=pids, io_mib_s=io_mib_s)


@app.command()
def update(
    machine: MachineName,
    network: Network = None,
    egress: EgressOption = None,
    bandwidth: Bandwidth = None,
    publish: Publish = None,
    unpublish: Unpublish = None,
    cpu_limit: CpuLimit = None,
    memory_limit: MemoryLimit = None,
    pids_limit: PidsLimit = None,
    io_limit: IoLimit = None,
    no_fork: Annotated[
        bool | None, typer.Option("--no-fork/--allow-fork", help="Refuse to be forked, or allow it again.")
    ] = None,
    restart: RestartOption = None,
    as_json: printing.Json = False,
) -> None:
    """Change a machine's network, ports, limits or restart policy, also while it runs."""
    change = ConfigChange(
        mode=network,
        egress=egress,
        bandwidth_bytes_s=bandwidth,
        publish=tuple(publish or ()),
        unpublish=tuple(unpublish or ()),
        limits=limits(cpu_limit, memory_limit, pids_limit, io_limit),
        no_fork=no_fork,
        restart=restart,
    )
    if change == ConfigChange():
        raise typer.BadParameter("nothing is to change: see forky update --help", param_hint="OPTIONS")

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        await found.update(change)
        if as_json:
            printing.document(documents.machine(found.info))
        else:
            printing.say(f"{found.name} is updated")

    connected(work)


@app.command()
def port(machine: MachineName, as_json: printing.Json = False) -> None:
    """List a machine's published ports.

    forky update MACHINE -p HOST:GUEST publishes one, --unpublish HOST closes it.
    """

    async def work(forky: "Forky") -> None:
        found = await forky.get(machine)
        ports = found.info.config.ports
        if as_json:
            printing.document([documents.port(each) for each in ports])
        elif not ports:
            printing.say(f"{found.name} publishes no port. Publish one: forky update {found.name} -p 8080:80")
        else:
            rows = [(f"{p.host_address}:{p.host_port}", f"{p.guest_port}/{p.protocol}") for p in ports]
            printing.table(("HOST", "GUEST"), rows)

    connected(work)
