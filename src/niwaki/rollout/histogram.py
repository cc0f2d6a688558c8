"""What was seen in one decision interval, as counts that only add up: requests by name, values of every signal.

Values lie between 0 and 1 (`signals` scales them) and fall on 1001 points or between two of them, so a tally is small,
adds to others without loss, and a value is known between `low` and `high`. Tests take the end that speaks against
them, which keeps what they promise.

    tally = Tally(); tally.add(0.25); tally.low, tally.high, tally.times  ->  [0.25], [0.25], [1]
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 1000
Floats = NDArray[np.float64]


class Tally:
    """How often which value was seen. An even key 2k is exactly k/POINTS, an odd one lies between its neighbours."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, value: float) -> None:
        """One more observation between 0 and 1."""
        if not 0 <= value <= 1:
            raise ValueError(f"expected a value between 0 and 1, got {value}")
        scaled = value * POINTS
        whole = round(scaled)
        self.counts[2 * whole if abs(scaled - whole) < 1e-9 else 2 * int(scaled) + 1] += 1

    @property
    def total(self) -> int:
        """Observations."""
        return self.counts.total()

    @property
    def low(self) -> Floats:
        """The least that each distinct value may have been."""
        return np.array([key // 2 for key in self.counts], dtype=np.float64) / POINTS

    @property
    def high(self) -> Floats:
        """The most that each distinct value may have been."""
        return np.array([(key + 1) // 2 for key in self.counts], dtype=np.float64) / POINTS

    @property
    def times(self) -> Floats:
        """How often each distinct value was seen."""
        return np.array(list(self.counts.values()), dtype=np.float64)

    @property
    def mean(self) -> float:
        """The mean, to half a step. Needs an observation."""
        return float((self.low + self.high) @ self.times) / (2 * self.total)

    @property
    def median(self) -> float:
        """The lower median, to half a step. Needs an observation."""
        seen = 0
        for key in sorted(self.counts):
            seen += self.counts[key]
            if 2 * seen >= self.total:
                return key / 2 / POINTS
        raise ValueError("a median needs an observation")


def added(tallies: Iterable[Tally]) -> Tally:
    """All observations together."""
    whole = Tally()
    for tally in tallies:
        whole.counts.update(tally.counts)
    return whole


@dataclass
class Interval:
    """One decision interval: its place in the roll-out (from 1), the step it ran at, and what was seen.

    `skipped`: what was not copied, audited or answered by the canary, by reason.
    """

    number: int
    step: int
    began: float
    requests: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def observe(self, signal: str, scaled: float) -> None:
        """One more value of a signal, scaled to 0..1."""
        self.tallies.setdefault(signal, Tally()).add(scaled)

    def tally(self, signal: str) -> Tally:
        """What was seen of a signal; empty if nothing was."""
        return self.tallies.get(signal, Tally())

    def as_json(self) -> dict[str, Any]:
        """For the store."""
        return {
            "number": self.number,
            "step": self.step,
            "began": self.began,
            "requests": dict(self.requests),
            "skipped": dict(self.skipped),
            "tallies": {name: dict(tally.counts) for name, tally in self.tallies.items()},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Interval":
        """What `as_json` wrote; JSON makes texts of whole keys."""
        tallies = {
            name: Tally({int(key): count for key, count in counts.items()})
            for name, counts in stored["tallies"].items()
        }
        requests, skipped = Counter(stored["requests"]), Counter(stored["skipped"])
        return cls(stored["number"], stored["step"], stored["began"], requests, skipped, tallies)
