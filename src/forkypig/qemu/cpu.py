"""Which of the host's CPU features a guest sees: what a snapshot of it needs where it is loaded."""

import functools
import hashlib
from pathlib import Path

_NAME = "model name"
_FLAGS = "flags"


@functools.cache
def features(cpu_model: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU that a guest with this `-cpu` sees of the host: its name and a hash of its features; "" under TCG, where
    QEMU's build says it all. A CPU with the same name can lack features, by microcode or by the hypervisor."""
    if cpu_model != "host":
        return ""
    found: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = " ".join(sorted(found.get(_FLAGS, "").split()))
    return f"{found.get(_NAME, 'unknown')}, features {hashlib.sha256(flags.encode()).hexdigest()[:12]}"
