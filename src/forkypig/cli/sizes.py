"""Amounts of memory and disk as people write them."""

import re

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([MGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_MIB = {"": 1, "M": 1, "G": 1 << 10, "T": 1 << 20}
_LARGEST_MIB = 1 << 30  # a pebibyte


def mib(text: str) -> int:
    """Mebibytes of "512M", "4G", "1.5G", or of a plain number, which is mebibytes. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"«{text}» is not a size: write 512M, 4G, 1.5G, or a number of MiB")
    amount = float(match[1]) * _MIB[match[2].upper()]
    if amount != int(amount) or not 1 <= amount <= _LARGEST_MIB:
        raise ValueError(f"«{text}» can't be had: a size is a whole number of MiB, at least 1M")
    return int(amount)


_BYTES = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def bytes_of(text: str) -> int:
    """Bytes of "500K", "10M", "1.5G", or of a plain number. Raises ValueError."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"«{text}» is not an amount: write 500K, 10M, or a number of bytes")
    return int(float(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2].upper()])


def human(count: float) -> str:
    """Bytes for a person: "3.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_mib(count: int) -> str:
    """Mebibytes for a person, as `mib` reads them: "512M", "1.5G"."""
    return f"{count / 1024:g}G" if count >= 1024 and count % 256 == 0 else f"{count}M"
