"""Medians and spread of a handful of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """`iqr` is the distance between the quartiles; all others are in the samples' unit as well."""

    n: int
    p50: float
    p90: float
    p99: float
    minimum: float
    maximum: float
    iqr: float


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default. With few samples a high percentile is
    close to the maximum, and says no more than that."""
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(samples: Sequence[float]) -> Summary:
    """Raises ValueError when there are no samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    return Summary(
        n=len(samples),
        p50=percentile(samples, 0.5),
        p90=percentile(samples, 0.9),
        p99=percentile(samples, 0.99),
        minimum=min(samples),
        maximum=max(samples),
        iqr=percentile(samples, 0.75) - percentile(samples, 0.25),
    )
