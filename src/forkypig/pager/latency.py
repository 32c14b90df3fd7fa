"""How long reads of the pager's files took, counted in buckets: a fault must not pay for more than an addition."""

from bisect import bisect_left

# A page that is in a frozen process takes some 100 µs, one from a pack a millisecond; a second is a reader that died.
BOUNDS_S = (50e-6, 100e-6, 200e-6, 400e-6, 800e-6, 1.6e-3, 3.2e-3, 6.4e-3, 12.8e-3, 25.6e-3, 0.1, 0.4, 1.6, 6.4)


class Latency:
    """Reads since this process started; those that failed count too."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)  # of each bucket alone; the last is beyond all bounds
        self.sum_s = 0.0
        self.bytes = 0

    def add(self, seconds: float, size_bytes: int) -> None:
        """One read was answered."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds
        self.bytes += size_bytes
