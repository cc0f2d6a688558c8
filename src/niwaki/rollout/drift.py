"""An alarm for traffic that is no longer what it was: other prompts, or other agreement.

Exchangeability is tested with a conformal martingale. Every new score is ranked among all before it; if nothing
changed, the ranks are uniform and independent, whatever the scores are. A martingale bets that they are not (the simple
jumper of Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection", COPA 2021), and
the alarm is the CUSUM of it: the martingale over its lowest value so far. With threshold c there is at most one false
alarm in c scores on average; ALARM is 10,000.

Traffic changes for good reasons, too. So an alarm stops nothing by itself: what was proved of quality before it no
longer counts (`Watch.since`, for `decision`), and the test begins anew with the traffic as it is now.

Agreement is its own score. A prompt's score is how surprising its characters are: mean surprisal of its hashed trigrams
under those of the first REFERENCE prompts. Only counts in BUCKETS are kept, never a text.

Cost: microseconds a prompt of 4,000 characters; a sorted list of scores, MOST at most.

    drift = Drift("prompts"); drift.add(surprise); drift.alarm
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
MOST = 5000  # scores that a new one is ranked among; later ones are ranked, but not kept
_JUMP = 0.01  # of the capital moves between the three bets after every score
_BETS = (-1.0, 0.0, 1.0)


@dataclass
class Drift:
    """The test over one stream of scores. `strength`: the CUSUM, compared with ALARM."""

    name: str
    scores: list[float] = field(default_factory=list)
    capitals: list[float] = field(default_factory=lambda: [1 / 3] * 3)
    log_level: float = 0.0
    lowest: float = 0.0
    strength: float = 1.0
    seen: int = 0

    def add(self, score: float, rng: random.Random) -> None:
        """One more score. Ties are ranked by chance, as exactness asks."""
        below, upto = bisect_left(self.scores, score), bisect_right(self.scores, score)
        rank = (below + rng.random() * (upto - below + 1)) / (len(self.scores) + 1)
        if len(self.scores) < MOST:
            insort(self.scores, score)
        self.seen += 1
        self._bet(rank)

    def _bet(self, rank: float) -> None:
        pool = sum(self.capitals)
        moved = [(1 - _JUMP) * capital + _JUMP * pool / 3 for capital in self.capitals]
        grown = [capital * (1 + bet * (rank - 0.5)) for capital, bet in zip(moved, _BETS, strict=True)]
        total = sum(grown)
        self.log_level += math.log(total)  # the capitals are kept at one, so that nothing runs out of the floats
        self.capitals = [capital / total for capital in grown]
        self.lowest = min(self.lowest, self.log_level)
        self.strength = math.exp(min(self.log_level - self.lowest, 700.0))

    @property
    def alarm(self) -> bool:
        """Whether the scores certainly changed."""
        return self.strength >= ALARM

    def as_json(self) -> dict[str, Any]:
        """For the store."""
        return {**vars(self), "scores": list(self.scores), "capitals": list(self.capitals)}


@dataclass
class Prompts:
    """Trigram counts of the first prompts; what comes later is scored by them."""

    counts: Counter[int] = field(default_factory=Counter)
    learned: int = 0

    def surprise(self, prompt: str) -> float | None:
        """Mean surprisal in nats a trigram; None while the reference is still being learned, or without a trigram."""
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
        """For the store."""
        return {"counts": dict(self.counts), "learned": self.learned}


@dataclass
class Watch:
    """Both alarms of a roll-out. `since`: the first interval whose proof still counts; `alarms`: a line for each."""

    prompts: Prompts = field(default_factory=Prompts)
    surprise: Drift = field(default_factory=lambda: Drift("prompts"))
    agreement: Drift = field(default_factory=lambda: Drift("agreement"))
    rng: random.Random = field(default_factory=random.Random)
    since: int = 1
    alarms: list[str] = field(default_factory=list)

    def add(self, prompt: str, agreement: float, interval: int) -> None:
        """One more audited request, in the interval of this number."""
        surprise = self.prompts.surprise(prompt)
        if surprise is not None:
            self.surprise.add(surprise, self.rng)
        self.agreement.add(agreement, self.rng)
        if self.surprise.alarm:
            self._raise("the prompts", interval)
            self.prompts, self.surprise = Prompts(), Drift("prompts")
        if self.agreement.alarm:
            self._raise("the agreement", interval)
            self.agreement = Drift("agreement")

    def _raise(self, what: str, interval: int) -> None:
        self.since = interval + 1
        self.alarms.append(f"{what} changed in interval {interval}: quality has to be proved anew")

    def as_json(self) -> dict[str, Any]:
        """For the store."""
        return {
            "prompts": self.prompts.as_json(),
            "surprise": self.surprise.as_json(),
            "agreement": self.agreement.as_json(),
            "since": self.since,
            "alarms": list(self.alarms),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], rng: random.Random) -> "Watch":
        """What `as_json` wrote."""
        counts = Counter({int(bucket): count for bucket, count in stored["prompts"]["counts"].items()})
        prompts = Prompts(counts, stored["prompts"]["learned"])
        surprise, agreement = Drift(**stored["surprise"]), Drift(**stored["agreement"])
        return cls(prompts, surprise, agreement, rng, stored["since"], list(stored["alarms"]))


def _buckets(prompt: str) -> list[int]:
    text = prompt[:CHARACTERS].lower()
    return [zlib.crc32(text[place : place + 3].encode("utf-8", "replace")) % BUCKETS for place in range(len(text) - 2)]
