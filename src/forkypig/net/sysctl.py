"""Kernel settings of the namespace in which the thread is."""

from pathlib import Path

ROOT = Path("/proc/sys/net")


def read(key: str) -> str | None:
    """A setting below net/, as in `ipv4/conf/eth0/forwarding`; None if this kernel has none of that name."""
    try:
        return (ROOT / key).read_text().strip()
    except FileNotFoundError:
        return None


def write(key: str, value: str) -> None:
    """Sets it. OSError if it can't be."""
    (ROOT / key).write_text(value)
