"""Kernel samepage merging, as it is on a host."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KsmStatus:
    """What it does now. Bytes."""

    running: bool
    tenants: tuple[str, ...]  # whose machines it is for
    merged_bytes: int  # of our machines' memory, in pages that others have too
    profit_bytes: int  # of the whole host, less what KSM takes itself; can be negative
    full_scans: int
