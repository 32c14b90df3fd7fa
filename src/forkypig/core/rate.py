"""How often one caller may call: a token bucket (Turner 1986, "New directions in communications")."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """`burst` calls at once, `per_s` calls a second in the long run. Times are seconds on any clock that never goes
    back."""

    per_s: float
    burst: int
    _level: float = field(init=False)
    _at_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._level = float(self.burst)

    def take(self, now_s: float) -> float:
        """Takes one and returns 0, or takes none and returns in how many seconds there will be one."""
        wait_s = self.wait_s(now_s)
        if not wait_s:
            self._level -= 1.0
        return wait_s

    def wait_s(self, now_s: float) -> float:
        """In how many seconds there will be one to take; 0: there is."""
        self._fill(now_s)
        return 0.0 if self._level >= 1.0 else (1.0 - self._level) / self.per_s

    def is_full(self, now_s: float) -> bool:
        """Whether it is as new, and so need not be remembered."""
        self._fill(now_s)
        return self._level >= self.burst

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._level = min(float(self.burst), self._level + passed_s * self.per_s)
        self._at_s = max(self._at_s, now_s)


class Rates:
    """A bucket for each caller."""

    _MOST = 10_000  # callers that are remembered; then those who have not called lately are forgotten

    def __init__(self, per_s: float, burst: int) -> None:
        """`per_s` 0: no limit."""
        self._per_s, self._burst = per_s, max(1, burst)
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, caller: str, now_s: float) -> float:
        """0, or in how many seconds the caller may call again."""
        if self._per_s <= 0:
            return 0.0
        if caller not in self._buckets:
            if len(self._buckets) >= self._MOST:
                self._buckets = {name: kept for name, kept in self._buckets.items() if not kept.is_full(now_s)}
            self._buckets[caller] = TokenBucket(self._per_s, self._burst)
        return self._buckets[caller].take(now_s)

    def wait_s(self, caller: str, now_s: float) -> float:
        """As `take`, and takes none."""
        bucket = self._buckets.get(caller)
        return bucket.wait_s(now_s) if bucket is not None else 0.0
