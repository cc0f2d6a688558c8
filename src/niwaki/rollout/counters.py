"""What the gateway counts while it runs: intervals, pairs of latencies, how often something was left out.

Latencies are compared at the same time: every one of the canary is paired with the latest of the dense model of the
same kind (stream or not) that no other was paired with, so that pairs are independent and a busy hour hits both.

    ledger.timed("canary", times); ledger.open.tally("decode_latency_ratio").total
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from niwaki.rollout.histogram import Interval, Tally, added
from niwaki.rollout.sequential import MAX_INTERVALS
from niwaki.rollout.signals import SIGNALS

_WAITING = 8  # latencies of the side that has more requests; older ones are not of the same time


@dataclass(frozen=True)
class Times:
    """How long an answer took. `first_s`: until the first byte of a stream; `token_s`: for a written token."""

    stream: bool
    total_s: float
    first_s: float | None
    token_s: float | None


@dataclass
class Ledger:
    """All counts of one roll-out."""

    open: Interval
    closed: list[Interval] = field(default_factory=list)
    _waiting: dict[tuple[str, bool], deque[Times]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, stored: Sequence[Interval], step: int, now: float) -> "Ledger":
        """From what the store holds; its last interval goes on."""
        if not stored:
            return cls(Interval(1, step, now))
        ledger = cls(stored[-1])
        for interval in stored[:-1]:
            ledger._close(interval)
        return ledger

    @property
    def intervals(self) -> list[Interval]:
        """All of them, oldest first, the open one last."""
        return [*self.closed, self.open]

    def request(self, side: str) -> None:
        """One more request that a side answered."""
        self.open.requests[side] += 1

    def skip(self, why: str) -> None:
        """One more request that was not copied, audited or answered by the canary."""
        self.open.skipped[why] += 1

    def outcome(self, *, failed: bool) -> None:
        """Whether the canary failed on a request that the dense model answers."""
        self.open.observe("error_rate", float(failed))

    def timed(self, side: str, times: Times) -> None:
        """An answer of a side; makes a pair as soon as the other side has one."""
        other = self._queue("stable" if side == "canary" else "canary", times.stream)
        if not other:
            self._queue(side, times.stream).append(times)
            return
        partner = other.pop()
        self.pair(*((partner, times) if side == "canary" else (times, partner)))

    def pair(self, stable: Times, canary: Times) -> None:
        """Two answers at the same time, or to the same request."""
        for name, dense_s, own_s in (
            ("prefill_latency_ratio", stable.first_s, canary.first_s),
            ("decode_latency_ratio", stable.token_s, canary.token_s),
        ):
            if dense_s and own_s is not None:
                self.open.observe(name, SIGNALS[name].scaled(own_s / dense_s))

    def audited(self, values: dict[str, float]) -> None:
        """What one audit showed, by the names of signals."""
        for name, value in values.items():
            self.open.observe(name, SIGNALS[name].scaled(value))

    def next_interval(self, step: int, now: float) -> None:
        """Ends the open interval and begins the next."""
        self._close(self.open)
        self.open = Interval(self.open.number + 1, step, now)

    def _close(self, interval: Interval) -> None:
        self.closed.append(interval)
        if len(self.closed) >= MAX_INTERVALS:
            self.closed[:2] = [_merged(*self.closed[:2])]

    def _queue(self, side: str, stream: bool) -> deque[Times]:
        return self._waiting.setdefault((side, stream), deque(maxlen=_WAITING))


def copied(interval: Interval) -> Interval:
    """A copy that the event loop no longer changes."""
    return Interval.from_json(interval.as_json())


def _merged(first: Interval, second: Interval) -> Interval:
    """Both as one, under the later number: their evidence then weighs less than it may, never more."""
    names = first.tallies.keys() | second.tallies.keys()
    tallies: dict[str, Tally] = {name: added([first.tally(name), second.tally(name)]) for name in names}
    requests, skipped = first.requests + second.requests, first.skipped + second.skipped
    return Interval(second.number, second.step, first.began, requests, skipped, tallies)
