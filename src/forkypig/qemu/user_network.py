"""QEMU's user-mode network: ports are published, and the cable is pulled, through the monitor.

It takes no privileges. Machines have no address of their own and don't see each other, connections don't survive a
fork, and what they may reach can't be restricted.
"""

from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.model import MachineConfig, NetworkMode, PortForward
from forkypig.qemu.session import Session

_NETDEV, _CARD = "net0", "nic0"


async def configure(session: Session, was: MachineConfig, now: MachineConfig) -> None:
    """Changes one machine's ports and its link. Raises NotPossibleNow when a port is in use."""
    for port in was.ports:
        if port not in now.ports:
            await _monitor(session, f"hostfwd_remove {_NETDEV} {_rule(port, guest=False)}")
    made: list[PortForward] = []
    try:
        for port in now.ports:
            if port not in was.ports:
                answer = await _monitor(session, f"hostfwd_add {_NETDEV} {_rule(port)}")
                if answer:
                    raise NotPossibleNow(
                        f"port {port.host_port}/{port.protocol} of this host is in use: publish another"
                    )
                made.append(port)
    except ForkyError:
        for port in made:
            await _monitor(session, f"hostfwd_remove {_NETDEV} {_rule(port, guest=False)}")
        raise
    if was.network.mode is not now.network.mode:
        up = now.network.mode is not NetworkMode.NONE
        await session.execute("set_link", {"name": _CARD, "up": up})


def _rule(port: PortForward, *, guest: bool = True) -> str:
    """slirp's syntax; every part of it is checked where it entered."""
    host = f"{port.protocol}:{port.host_address}:{port.host_port}"
    return f"{host}-10.0.2.15:{port.guest_port}" if guest else host


async def _monitor(session: Session, command: str) -> str:
    """There is no QMP command for it."""
    return str(await session.execute("human-monitor-command", {"command-line": command})).strip()
