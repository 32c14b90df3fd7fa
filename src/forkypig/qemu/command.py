"""The QEMU command line of a machine.

One function makes it for a machine that boots and for a shell that waits for device state, because the two must be
the same machine to the last device: a shell loads exactly what the other saved.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forkypig.model import Shape
from forkypig.qemu import nodes

AGENT_PORT = "forky.agent.0"

# Devices of the machine type that no guest of ours uses. Each costs time at every load and start of a shell.
_UNUSED = "vmport=off,sata=off,smbus=off,usb=off,graphics=off,i8042=off,hpet=off"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What must be the same in every process that a machine ever runs in, besides its shape."""

    machine_type: str  # versioned, "pc-q35-7.2"
    accelerator: str  # "tcg" or "kvm"
    cpu_model: str  # "max" or "host"
    network: str  # what the network card hangs on: "tap", "user", or "none": there is no card
    mtu: int = 1500  # that the card tells the guest


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """A kernel to start with; a shell has none."""

    kernel: Path
    initrd: Path
    cmdline: str


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors that QEMU inherits. The Unix sockets are bound and listen before QEMU starts, so a client can connect
    at once, without polling for a path to appear. A tap needs privileges to be opened, which QEMU has not."""

    qmp_fd: int
    agent_fd: int
    tap_fd: int = -1  # an open queue of a tap, where the network is one


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """All that the command line of one QEMU process depends on."""

    qemu: str
    process_id: str
    hardware: Hardware
    shape: Shape
    disks: Sequence[tuple[Path, str]]  # the qcow2 overlay and all below it, top first, with formats
    console: Path  # appended to
    memory: Path | None  # a pager's file to map MAP_PRIVATE; None: fresh memory of its own
    boot: DirectBoot | None  # None: a shell, which waits for device state
    aio: str = "threads"  # how QEMU reads files: "io_uring" where the kernel has it (disks.aio_engine)
    paused: bool = False  # stay paused after the load
    generation_id: uuid.UUID = field(default_factory=uuid.uuid4)

    def arguments(self, inherited: Inherited) -> list[str]:
        """The argument list."""
        hardware, shape = self.hardware, self.shape
        unused = _UNUSED
        arguments = [
            self.qemu,
            *("-name", f"guest={self.process_id},process=forky-{self.process_id}"),
            *("-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
            *(
                "-machine",
                f"{hardware.machine_type},accel={hardware.accelerator},memory-backend=ram0,suppress-vmdesc=on,"
                f"dump-guest-core=off,mem-merge=off,{unused}",
            ),
            *("-cpu", hardware.cpu_model),
            *("-smp", str(shape.cpus)),
            *("-m", f"{shape.memory_mib}M"),
            *("-object", self._memory_backend()),
            *("-global", "migration.send-configuration=off"),
            *("-rtc", "base=utc"),
            *("-chardev", f"socket,id=qmp,fd={inherited.qmp_fd},server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"file,id=console,path={_escaped(self.console)},append=on"),
            *("-serial", "chardev:console"),
            *("-device", f"vmgenid,guid={self.generation_id}"),
            *("-device", "virtio-serial-pci,id=ports,max_ports=2"),
            *("-chardev", f"socket,id=agent,fd={inherited.agent_fd},server=on,wait=off"),
            *("-device", f"virtserialport,bus=ports.0,nr=1,chardev=agent,name={AGENT_PORT}"),
            *self._block_nodes(),
            # An error that the host may get over stops the machine instead of reaching the guest (hostd/full_disk.py).
            *(
                "-device",
                f"virtio-blk-pci,drive={nodes.format_name(nodes.TOP)},num-queues=1,werror=stop,rerror=stop",
            ),
        ]
        if hardware.network != "none":
            backend = f"tap,id=net0,fd={inherited.tap_fd}" if hardware.network == "tap" else "user,id=net0"
            arguments += [
                *("-netdev", backend),
                *(
                    "-device",
                    f"virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,host_mtu={hardware.mtu},romfile=",
                ),
            ]
        if self.boot is None:
            arguments += ["-incoming", "defer"]
        else:
            arguments += ["-kernel", str(self.boot.kernel), "-initrd", str(self.boot.initrd)]
            arguments += ["-append", self.boot.cmdline]
        if self.paused:
            arguments.append("-S")
        return arguments

    def _block_nodes(self) -> list[str]:
        """The disk's nodes, from the image at the bottom to the overlay."""
        arguments: list[str] = []
        for depth in reversed(range(len(self.disks))):
            path, driver = self.disks[depth]
            below = str(depth + 1) if depth + 1 < len(self.disks) else None
            for options in (
                nodes.file_node(str(depth), path, self.aio),
                nodes.format_node(str(depth), driver, below),
            ):
                arguments += ["-blockdev", json.dumps(options)]
        return arguments

    def _memory_backend(self) -> str:
        """A child maps the pager's file; a machine that boots has a memfd, which the pager can read by descriptor
        without allocating the holes (MAP_SHARED: private mappings of a memfd would hold every page twice)."""
        size = f"size={self.shape.memory_mib}M"
        if self.memory is None:
            return f"memory-backend-memfd,id=ram0,share=on,{size}"
        return f"memory-backend-file,id=ram0,share=off,reserve=off,mem-path={_escaped(self.memory)},{size}"


def _escaped(path: Path) -> str:
    """A path inside a comma-separated option: QEMU takes a doubled comma for one."""
    return str(path).replace(",", ",,")
