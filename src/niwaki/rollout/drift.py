"""Alarm for a change of the traffic: other prompts, or other agreement.

The test of exchangeability is a conformal martingale. Each new score is ranked among all earlier ones. Without a
change the ranks are uniform and independent, for any distribution of the scores. A martingale bets against that. It is
the simple jumper of Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection",
COPA 2021. The alarm is its CUSUM: the martingale divided by its lowest value so far. With a threshold c there is at
most one false alarm in c scores on average. ALARM is 10,000.

Traffic may also change without a fault, so an alarm does not stop a roll-out. It only removes the earlier proof of
quality (`DriftWatch.since`, for `decision`), and the test starts again with the new traffic.

Agreement is its own score. The score of a prompt is the mean surprisal of its hashed trigrams, under those of the first
REFERENCE prompts. Only counts in BUCKETS are kept, no text.

Cost: microseconds per prompt of 4,000 characters, and a sorted list of at most MAX_SCORES scores.

    drift = DriftTest("prompts"); drift.add(surprise, rng); drift.alarm
"""

import math
import random
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALARM = 10_000.0
REFERENCE = 50
BUCKETS = 4096
CHARACTERS = 4000
MAX_SCORES = 5000  # that are kept. Later scores are ranked among them
_JUMP = 0.01  # share of the capital that moves between the three bets after each score
_BETS = (-1.0, 0.0, 1.0)


@dataclass
class DriftTest:
    """Test of one stream of scores. `strength`: the CUSUM, which is compared with ALARM."""

    name: str
    scores: list[float] = field(default_factory=list)
    capitals: list[float] = field(default_factory=lambda: [1 / 3] * 3)
    log_level: float = 0.0
    lowest: float = 0.0
    strength: float = 1.0
    seen: int = 0

    def add(self, score: float, rng: random.Random) -> None:
        """Add a score. The rank of a tie is random, which makes the test exact."""
        below, upto = bisect_left(self.scores, score), bisect_right(self.scores, score)
        rank = (below + rng.random() * (upto - below + 1)) / (len(self.scores) + 1)
        if len(self.scores) < MAX_SCORES:
            insort(self.scores, score)
        self.seen += 1
        self._bet(rank)

    def _bet(self, rank: float) -> None:
        pool = sum(self.capitals)
        moved = [(1 - _JUMP) * capital + _JUMP * pool / 3 for capital in self.capitals]
        grown = [capital * (1 + bet * (rank - 0.5)) for capital, bet in zip(moved, _BETS, strict=True)]
        total = sum(grown)
        self.log_level += math.log(total)  # the capitals stay at a sum of one, so no float overflows
        self.capitals = [capital / total for capital in grown]
        self.lowest = min(self.lowest, self.log_level)
        self.strength = math.exp(min(self.log_level - self.lowest, 700.0))

    @property
    def alarm(self) -> bool:
        """Check that the scores certainly changed."""
        return self.strength >= ALARM

    def as_json(self) -> dict[str, Any]:
        """Return the values as JSON, for the store."""
        return {**vars(self), "scores": list(self.scores), "capitals": list(self.capitals)}


@dataclass
class PromptReference:
    """Trigram counts of the first prompts, which score the later ones."""

    counts: Counter[int] = field(default_factory=Counter)
    learned: int = 0

    def surprise(self, prompt: str) -> float | None:
        """Return the mean surprisal in nats per trigram. It is None for the first prompts and without a trigram."""
        buckets = _buckets(prompt)
        if not buckets:
            return None
        if self.learned < REFERENCE:
            self.counts.update(buckets)
            self.learned += 1
            return None
        whole = self.counts.total() + BUCKETS
        return sum(math.log(whole / (self.counts[bucket] + 1)) for bucket in buckets) / len(buckets)

    def as_json(self) -> dict[str, Any]:
        """Return the values as JSON, for the store."""
        return {"counts": dict(self.counts), "learned": self.learned}


@dataclass
class DriftWatch:
    """Both tests of a roll-out. `since`: first interval whose proof counts. `alarms`: one line per alarm."""

    prompts: PromptReference = field(default_factory=PromptReference)
    surprise: DriftTest = field(default_factory=lambda: DriftTest("prompts"))
    agreement: DriftTest = field(default_factory=lambda: DriftTest("agreement"))
    rng: random.Random = field(default_factory=random.Random)
    since: int = 1
    alarms: list[str] = field(default_factory=list)

    def add(self, prompt: str, agreement: float, interval: int) -> None:
        """Add an audited request of the interval with this number."""
        surprise = self.prompts.surprise(prompt)
        if surprise is not None:
            self.surprise.add(surprise, self.rng)
        self.agreement.add(agreement, self.rng)
        if self.surprise.alarm:
            self._add_alarm("the prompts", interval)
            self.prompts, self.surprise = PromptReference(), DriftTest("prompts")
        if self.agreement.alarm:
            self._add_alarm("the agreement", interval)
            self.agreement = DriftTest("agreement")

    def _add_alarm(self, subject: str, interval: int) -> None:
        self.since = interval + 1
        self.alarms.append(f"{subject} changed in interval {interval}: quality needs new proof")

    def as_json(self) -> dict[str, Any]:
        """Return the values as JSON, for the store."""
        return {
            "prompts": self.prompts.as_json(),
            "surprise": self.surprise.as_json(),
            "agreement": self.agreement.as_json(),
            "since": self.since,
            "alarms": list(self.alarms),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], rng: random.Random) -> "DriftWatch":
        """Return the tests of a JSON object."""
        counts = Counter({int(bucket): count for bucket, count in stored["prompts"]["counts"].items()})
        prompts = PromptReference(counts, stored["prompts"]["learned"])
        surprise, agreement = DriftTest(**stored["surprise"]), DriftTest(**stored["agreement"])
        return cls(prompts, surprise, agreement, rng, stored["since"], list(stored["alarms"]))


def _buckets(prompt: str) -> list[int]:
    text = prompt[:CHARACTERS].lower()
    return [zlib.crc32(text[start : start + 3].encode("utf-8", "replace")) % BUCKETS for start in range(len(text) - 2)]
