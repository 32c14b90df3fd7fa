"""What a snapshot needs where it is loaded, held against what a host has.

The format of what is stored has a version of its own, which the pager checks when it reads a manifest (docs/format.md).
"""

from dataclasses import dataclass

from forkypig.errors import NotPossibleNow
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.qemu.command import Hardware
from forkypig.qemu.cpu import Cpu


@dataclass(frozen=True, slots=True)
class Here:
    """What machines are made of on this host."""

    build_id: str  # of QEMU
    hardware: Hardware
    accelerator_why: str  # why it is that one
    network_why: str
    cpu: Cpu  # what its guests see of the processor


def check_loadable(record: SnapshotRecord, here: Here) -> None:
    """Raises NotPossibleNow, with the reason, where the snapshot can't be loaded.

    Device state is only understood by the QEMU build that wrote it: the read-only memory of a machine (firmware,
    tables) is not in a snapshot, every process loads its own, and it must be the same.
    """
    snapshot, made, now = record.snapshot, record.hardware, here.hardware
    if record.phase is SnapshotPhase.SPLITTING:
        raise NotPossibleNow(f"snapshot {snapshot.id} is being made: try again in a moment")
    if record.phase is SnapshotPhase.LOST:
        raise NotPossibleNow(
            f"the memory of snapshot {snapshot.id} is lost, since its process ended before it was packed: choose "
            f"another (forky snapshots)"
        )
    if snapshot.qemu_build != here.build_id:
        raise NotPossibleNow(
            f"snapshot {snapshot.id} was made by another build of QEMU ({snapshot.qemu_build}; "
            f"here is {here.build_id}): install that build, or start its machine afresh"
        )
    if made.accelerator != now.accelerator:
        raise NotPossibleNow(
            f"snapshot {snapshot.id} was made under {made.accelerator}, and this host uses {now.accelerator} "
            f"({here.accelerator_why}): set FORKY_ACCELERATOR={made.accelerator}"
        )
    if (made.machine_type, made.cpu_model) != (now.machine_type, now.cpu_model):
        raise NotPossibleNow(
            f"snapshot {snapshot.id} is of a {made.machine_type} with the CPU model «{made.cpu_model}», and machines "
            f"here are {now.machine_type} with «{now.cpu_model}»: start its machine afresh"
        )
    if record.cpu and record.cpu != here.cpu.name:
        raise NotPossibleNow(
            f"snapshot {snapshot.id} was made on another CPU ({record.cpu}; here is {here.cpu.name}), and its guest "
            f"sees that: load it on a computer like that one"
        )
    if lacking := sorted(set(record.cpu_features) - set(here.cpu.features)):
        raise NotPossibleNow(
            f"snapshot {snapshot.id} needs features that this CPU has not ({_some(lacking)}), and its guest may use "
            f"them: load it on a computer that has them"
        )
    if made.network != now.network:
        raise NotPossibleNow(
            f"snapshot {snapshot.id} was made with the network card on «{made.network}», and this host "
            f"uses «{now.network}» ({here.network_why}): set FORKY_NETWORK as it was"
        )


def _some(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
