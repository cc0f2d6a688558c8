"""Counts of one decision interval: requests by name, and a histogram of the values of each signal.

Values lie between 0 and 1 (`signals` scales them). They fall on 1001 points or between two of them. Thus a histogram is
small, and a sum of histograms loses nothing. A value is known to lie between `low` and `high`. A test takes the
end that is against its claim, so its error bound holds.

    histogram = Histogram(); histogram.add(0.25); histogram.low, histogram.counts_V  ->  [0.25], [1]
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 1000
Floats = NDArray[np.float64]


class Histogram:
    """Counts of distinct values. An even key 2k is exactly k/POINTS, an odd one lies between its neighbours."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, value: float) -> None:
        """Count an observation. Raise ValueError if it is not between 0 and 1."""
        if not 0 <= value <= 1:
            raise ValueError(f"expected a value between 0 and 1, got {value}")
        scaled = value * POINTS
        whole = round(scaled)
        self.counts[2 * whole if abs(scaled - whole) < 1e-9 else 2 * int(scaled) + 1] += 1

    @property
    def total(self) -> int:
        """Return the number of observations."""
        return self.counts.total()

    @property
    def low(self) -> Floats:
        """Return the lower bound of each distinct value."""
        return np.array([key // 2 for key in self.counts], dtype=np.float64) / POINTS

    @property
    def high(self) -> Floats:
        """Return the upper bound of each distinct value."""
        return np.array([(key + 1) // 2 for key in self.counts], dtype=np.float64) / POINTS

    @property
    def counts_V(self) -> Floats:
        """Return the number of observations of each distinct value."""
        return np.array(list(self.counts.values()), dtype=np.float64)

    @property
    def mean(self) -> float:
        """Return the mean, to half a step. It needs an observation."""
        return float((self.low + self.high) @ self.counts_V) / (2 * self.total)

    @property
    def median(self) -> float:
        """Return the lower median, to half a step. Raise ValueError without an observation."""
        below = 0
        for key in sorted(self.counts):
            below += self.counts[key]
            if 2 * below >= self.total:
                return key / 2 / POINTS
        raise ValueError("a median needs an observation")


def merge_histograms(histograms: Iterable[Histogram]) -> Histogram:
    """Return the histogram of all observations."""
    whole = Histogram()
    for histogram in histograms:
        whole.counts.update(histogram.counts)
    return whole


@dataclass
class Interval:
    """Decision interval: its number in the roll-out (from 1), its step, and its counts.

    `skipped`: requests that were not copied, not audited or not answered by the canary, by reason.
    """

    number: int
    step: int
    began: float
    requests: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def observe(self, signal: str, scaled: float) -> None:
        """Count a value of a signal, scaled to 0..1."""
        self.histograms.setdefault(signal, Histogram()).add(scaled)

    def histogram(self, signal: str) -> Histogram:
        """Return the histogram of a signal, which may be empty."""
        return self.histograms.get(signal, Histogram())

    def as_json(self) -> dict[str, Any]:
        """Return the interval as JSON, for the store."""
        return {
            "number": self.number,
            "step": self.step,
            "began": self.began,
            "requests": dict(self.requests),
            "skipped": dict(self.skipped),
            "histograms": {name: dict(histogram.counts) for name, histogram in self.histograms.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Interval":
        """Return the interval of a JSON object. JSON turns whole keys into texts."""
        histograms = {
            name: Histogram({int(key): count for key, count in counts.items()})
            for name, counts in stored.get("histograms", stored.get("tallies", {})).items()
        }
        requests, skipped = Counter(stored["requests"]), Counter(stored["skipped"])
        return cls(stored["number"], stored["step"], stored["began"], requests, skipped, histograms)
