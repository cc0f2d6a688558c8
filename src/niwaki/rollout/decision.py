"""What to do at the end of an interval: counters and limits in; hold, widen or return out. No clock, file or network.

- **Return** when a limit is certainly broken since some interval. All limits share the error: over a whole roll-out, a
  canary that keeps them is returned with a probability of at most 1 − confidence (`sequential`).
- **Widen** when the step has answered enough requests and was audited enough, what was seen at it keeps every limit,
  and it is certain that quality does: as in `niwaki gate`, what was measured is not enough, the far end of the interval
  has to keep the limit.
- **Hold** otherwise, and say what is missing.

    decide(Policy(), {"error_rate": 0.002, "top1_agreement": 0.9}, step=0, intervals=[...]).action  ->  "hold"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from niwaki.rollout.histogram import Interval, Tally, added
from niwaki.rollout.sequential import band, certainly_above, certainly_below, excess, shortfall
from niwaki.rollout.signals import SIGNALS

# At 100 % there are no pairs but of what dense still wrote when the share widened: they may not hold it up for good.
FEWEST_PAIRS = 20
Action = Literal["hold", "widen", "return"]


class Policy(BaseModel):
    """How a roll-out goes: shares of traffic, and what a step needs before the next.

    An interval ends after `interval_s` and `min_requests` of the canary, whichever is later; limits are looked at every
    `interval_s` all the same. With 500 requests an interval, 2 % errors where 0.2 % are allowed are missed by two
    intervals with a probability of 0.5 % (10 of 1000 requests have to fail).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5, 1.0)
    interval_s: float = Field(default=60.0, gt=0)
    min_requests: int = Field(default=500, ge=1)
    min_audits: int = Field(default=30, ge=0)
    confidence: float = Field(default=0.95, ge=0.5, le=0.999)

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] > 1:
            raise ValueError("expected shares from 0 to 1, each above the one before")
        return steps


@dataclass(frozen=True)
class Finding:
    """One signal: what was seen, where its centre certainly lies, and what that says about the limit."""

    signal: str
    limit: float
    seen: int
    value: float | None
    low: float | None
    high: float | None
    broken: bool
    kept: bool

    def as_json(self) -> dict[str, Any]:
        """For the store and the dashboard."""
        return dict(vars(self))


@dataclass(frozen=True)
class Verdict:
    """What to do, why in a sentence, and what it rests on."""

    action: Action
    reason: str
    findings: tuple[Finding, ...]


def decide(
    policy: Policy,
    limits: Mapping[str, float],
    step: int,
    intervals: Sequence[Interval],
    since: int = 1,
) -> Verdict:
    """Judges the intervals of one roll-out, oldest first. Quality is proved by intervals from `since` on (drift)."""
    findings = tuple(find(policy, limits, intervals, name, since) for name in limits)
    broken = [finding for finding in findings if finding.broken]
    if broken:
        return Verdict("return", "; ".join(_said(finding) for finding in broken), findings)
    missing = [*_missing(policy, step, intervals, findings), *_worse(limits, step, intervals)]
    if missing:
        return Verdict("hold", "; ".join(missing), findings)
    return Verdict("widen", "every limit is kept", findings)


def find(
    policy: Policy, limits: Mapping[str, float], intervals: Sequence[Interval], name: str, since: int = 1
) -> Finding:
    """What the intervals say about one signal."""
    signal, limit = SIGNALS[name], limits[name]
    tallies = [interval.tally(name) for interval in intervals]
    whole, at = added(tallies), signal.scaled(limit)
    if not whole.total:
        return Finding(name, limit, 0, None, None, None, broken=False, kept=False)
    upper, first, tests = signal.limit == "max", intervals[0].number, len(limits)
    least = math.log(tests / (1 - policy.confidence))
    against = (excess if upper else shortfall)(tallies, at, signal.centre, first)
    counted = [interval.tally(name) for interval in intervals if interval.number >= since]
    in_favour = (certainly_below if upper else certainly_above)(counted, at, signal.centre)
    low, high = band(tallies, signal.centre, policy.confidence)
    centre = whole.mean if signal.centre == "mean" else whole.median
    return Finding(
        name, limit, whole.total, signal.value(centre), signal.value(low), signal.value(high),
        broken=against >= least, kept=in_favour >= least,
    )  # fmt: skip


def requests_of(step: int, intervals: Sequence[Interval]) -> int:
    """Requests that the canary answered or failed at this step, shadow copies included."""
    return sum(interval.tally("error_rate").total for interval in intervals if interval.step == step)


def _missing(policy: Policy, step: int, intervals: Sequence[Interval], findings: Sequence[Finding]) -> list[str]:
    requests = requests_of(step, intervals)
    missing = [] if requests >= policy.min_requests else [f"{requests} of {policy.min_requests} requests at this step"]
    quality = [finding for finding in findings if SIGNALS[finding.signal].proved]
    if quality:
        here: list[Tally] = [i.tally(quality[0].signal) for i in intervals if i.step == step]
        audits = added(here).total
        missing += [] if audits >= policy.min_audits else [f"{audits} of {policy.min_audits} audits at this step"]
    missing += [
        f"{one.signal} is not yet certain to keep {one.limit:g} ({_between(one)})" for one in quality if not one.kept
    ]
    return missing


def _worse(limits: Mapping[str, float], step: int, intervals: Sequence[Interval]) -> list[str]:
    """Limits that what was seen at this step does not keep, certain or not."""
    found = []
    for name, limit in limits.items():
        signal = SIGNALS[name]
        here = added(interval.tally(name) for interval in intervals if interval.step == step)
        if here.total < (FEWEST_PAIRS if signal.centre == "median" else 1):
            continue
        value = signal.value(here.mean if signal.centre == "mean" else here.median)
        if (value > limit) if signal.limit == "max" else (value < limit):
            found.append(f"{name} was {value:.4g} at this step, the limit is {limit:g}")
    return found


def _said(finding: Finding) -> str:
    side = "above" if SIGNALS[finding.signal].limit == "max" else "below"
    return f"{finding.signal} is certainly {side} {finding.limit:g} (since the roll-out began {_between(finding)})"


def _between(finding: Finding) -> str:
    if finding.value is None:
        return "nothing seen"
    return f"{finding.value:.4g}, {finding.low:.4g} to {finding.high:.4g} from {finding.seen}"
