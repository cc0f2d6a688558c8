"""Counters of the running gateway: intervals, pairs of latencies, skipped requests.

Latencies are compared at the same time. A latency of the canary is paired with the latest one of the dense model that
has no pair. Both are of the same kind, stream or not. Thus pairs are independent, and a busy hour affects both sides.

    counters.add_times("canary", times); counters.open.histogram("decode_latency_ratio").total
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from niwaki.rollout.histogram import Histogram, Interval, merge_histograms
from niwaki.rollout.sequential import MAX_INTERVALS
from niwaki.rollout.signals import SIGNALS

_MAX_WAITING = 8  # latencies without a pair. Older ones are not of the same time


@dataclass(frozen=True)
class AnswerTimes:
    """Seconds of an answer. `first_s`: to the first byte of a stream. `token_s`: per generated token."""

    stream: bool
    total_s: float
    first_s: float | None
    token_s: float | None


@dataclass
class RolloutCounters:
    """Counters of one roll-out: the closed intervals and the open one."""

    open: Interval
    closed: list[Interval] = field(default_factory=list)
    _waiting: dict[tuple[str, bool], deque[AnswerTimes]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, stored: Sequence[Interval], step: int, now: float) -> "RolloutCounters":
        """Return the counters of the stored intervals. The last one stays open."""
        if not stored:
            return cls(Interval(1, step, now))
        counters = cls(stored[-1])
        for interval in stored[:-1]:
            counters._close(interval)
        return counters

    @property
    def intervals(self) -> list[Interval]:
        """Return all intervals, oldest first, the open one last."""
        return [*self.closed, self.open]

    def count_request(self, side: str) -> None:
        """Count a request that a side answered."""
        self.open.requests[side] += 1

    def count_skipped(self, reason: str) -> None:
        """Count a request that was not copied, not audited, or not answered by the canary."""
        self.open.skipped[reason] += 1

    def count_outcome(self, *, failed: bool) -> None:
        """Count a request of the canary. It failed if only the dense model can answer it."""
        self.open.observe("error_rate", float(failed))

    def add_times(self, side: str, times: AnswerTimes) -> None:
        """Pair the times of an answer with one of the other side, or keep them for the next one."""
        other = self._queue("stable" if side == "canary" else "canary", times.stream)
        if not other:
            self._queue(side, times.stream).append(times)
            return
        partner = other.pop()
        self.add_pair(*((partner, times) if side == "canary" else (times, partner)))

    def add_pair(self, stable: AnswerTimes, canary: AnswerTimes) -> None:
        """Observe the ratios of two answers at the same time, or to the same request."""
        for name, dense_s, own_s in (
            ("prefill_latency_ratio", stable.first_s, canary.first_s),
            ("decode_latency_ratio", stable.token_s, canary.token_s),
        ):
            if dense_s and own_s is not None:
                self.open.observe(name, SIGNALS[name].scaled(own_s / dense_s))

    def add_audit(self, values: dict[str, float]) -> None:
        """Observe the values of one audit, by the names of signals."""
        for name, value in values.items():
            self.open.observe(name, SIGNALS[name].scaled(value))

    def next_interval(self, step: int, now: float) -> None:
        """Close the open interval and open the next one."""
        self._close(self.open)
        self.open = Interval(self.open.number + 1, step, now)

    def _close(self, interval: Interval) -> None:
        self.closed.append(interval)
        if len(self.closed) >= MAX_INTERVALS:
            self.closed[:2] = [_merge(*self.closed[:2])]

    def _queue(self, side: str, stream: bool) -> deque[AnswerTimes]:
        return self._waiting.setdefault((side, stream), deque(maxlen=_MAX_WAITING))


def copy_interval(interval: Interval) -> Interval:
    """Return a copy that the event loop does not change."""
    return Interval.from_json(interval.as_json())


def _merge(first: Interval, second: Interval) -> Interval:
    """Return both intervals as one, under the later number. Their evidence may only lose weight by that."""
    names = first.histograms.keys() | second.histograms.keys()
    histograms: dict[str, Histogram] = {
        name: merge_histograms([first.histogram(name), second.histogram(name)]) for name in names
    }
    requests, skipped = first.requests + second.requests, first.skipped + second.skipped
    return Interval(second.number, second.step, first.began, requests, skipped, histograms)
