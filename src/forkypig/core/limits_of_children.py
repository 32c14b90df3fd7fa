"""What limits a machine has when nobody asked for any, and what its children may be given. Pure.

A child has its parent's limits and can only be given tighter ones: a guest that may fork itself can then not fork its
way out of them. The limits hold for each machine by itself; a parent with ten children may use eleven times as much.
"""

from dataclasses import fields, replace
from typing import Any

from forkypig.errors import InvalidRequest
from forkypig.model import Limits, Shape

# The main loop emulates devices and carries disk and network; it is one thread, so it can use one core at most. A
# machine that behaves is therefore never throttled by its default, whose period would show as stalls of up to 100 ms.
_CPUS_FOR_QEMU = 1.0

# QEMU's heap, its page tables for the guest (1/512 of it), block caches per layer, and the pages of its own program
# that it was the first to read: 172 MiB after a boot under TCG, 84 of them the program.
_MEMORY_FOR_QEMU_MIB = 256
_GUEST_PER_MIB_OF_TABLES = 64
# accel/tcg takes 1 GiB for translated code unless told otherwise (tcg/region.c, DEFAULT_CODE_GEN_BUFFER_SIZE), fills
# it as the guest runs new code, and starts over when it is full. Two CPUs that compiled, packed and searched for two
# minutes had QEMU at 268 MiB beyond the guest's memory, and growing.
_TRANSLATED_CODE_MIB = 1024
_TLB_PER_CPU_MIB = 64

# Main loop, RCU, one a vCPU, and at most 64 + 64 workers for the disk (thread pool, io_uring); twice, because both
# the old process and the successor are there during a split.
_THREADS = 512
_THREADS_PER_CPU = 4

_UNITS = {
    "cpus": ("CPUs", "--cpu-limit", ""),
    "memory_mib": ("MiB of memory", "--memory-limit", "M"),
    "pids": ("threads", "--pids-limit", ""),
    "io_mib_s": ("MiB/s of disk", "--io-limit", "M"),
}


def usual(shape: Shape, accelerator: str) -> Limits:
    """The limits of a machine that was given none: room for its guest and for QEMU itself; the disk is not limited."""
    own_mib = _MEMORY_FOR_QEMU_MIB + shape.memory_mib // _GUEST_PER_MIB_OF_TABLES
    if accelerator != "kvm":
        own_mib += _TRANSLATED_CODE_MIB + _TLB_PER_CPU_MIB * shape.cpus
    return Limits(
        cpus=shape.cpus + _CPUS_FOR_QEMU,
        memory_mib=shape.memory_mib + own_mib,
        pids=_THREADS + _THREADS_PER_CPU * shape.cpus,
        io_mib_s=None,
    )


def completed(limits: Limits, shape: Shape, accelerator: str) -> Limits:
    """The limits as they are set: those asked for, and the usual ones in place of the rest."""
    defaults = usual(shape, accelerator)
    return replace(defaults, **_given(limits))


def tightened(parent: Limits, asked: Limits, defaults: Limits | None = None) -> Limits:
    """A child's limits: its parent's, tightened by those asked for.

    `defaults` (`usual`) stand for what the parent was not given; without them a limit asked for where the parent has
    only its default is taken as it is. Raises InvalidRequest for a limit that is wider than the parent's.
    """
    bounds = _given(replace(defaults or Limits(), **_given(parent)))
    for name, wanted in _given(asked).items():
        if name in bounds and wanted > bounds[name]:
            unit, option, suffix = _UNITS[name]
            raise InvalidRequest(
                f"a child can't be given {wanted} {unit}, its parent has {bounds[name]}: "
                f"use {option} {bounds[name]}{suffix} or less, or widen the parent's first (forky update)"
            )
    return replace(parent, **_given(asked))


def _given(limits: Limits) -> dict[str, Any]:
    """Those that are not left to their defaults."""
    values = {field.name: getattr(limits, field.name) for field in fields(limits)}
    return {name: value for name, value in values.items() if value is not None}
