"""Which of the host's CPU a guest sees: what a snapshot of it needs where it is loaded."""

import functools
from pathlib import Path
from typing import NamedTuple

_NAME = "model name"
_FLAGS = "flags"


class Cpu(NamedTuple):
    """A processor. Both are empty where the guest sees none of the host's, but one that QEMU makes."""

    name: str
    features: tuple[str, ...]  # as Linux names them, sorted


@functools.cache
def seen_with(cpu_model: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """What a guest with this `-cpu` sees of the host. Under TCG nothing: QEMU's build and the model say it all. A CPU
    with the same name can lack features, by microcode or by the hypervisor."""
    if cpu_model != "host":
        return Cpu("", ())
    found: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return Cpu(found.get(_NAME, "unknown"), tuple(sorted(found.get(_FLAGS, "").split())))
