"""Spans of time as people write them."""

import re

_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|min|h|d|w)?", re.ASCII)
_SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str) -> float:
    """Of "30d", "12h", "10m", "1.5s", "200ms", or of a plain number, which is seconds. Raises ValueError."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"«{text[:40]}» is no span of time: write 30d, 12h, 10m, 45s or 200ms")
    return float(match[1]) * _SECONDS[match[2] or ""]
