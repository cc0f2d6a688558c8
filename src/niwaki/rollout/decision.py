"""Decision at the end of an interval: hold, widen or return, from counters and limits. No clock, file or network.

- **Return** if a limit is certainly broken since some interval. All limits share the error: over a whole roll-out, a
  canary that keeps them is returned with a probability of at most 1 − confidence (`sequential`).
- **Widen** if the step has enough requests and audits, its values keep every limit, and quality certainly does. As in
  `niwaki gate`, the measured value is not enough: the far end of the confidence band must keep the limit.
- **Hold** in all other cases, with the missing evidence as the reason.

    decide(Policy(), {"error_rate": 0.002, "top1_agreement": 0.9}, step=0, intervals=[...]).action  ->  "hold"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from niwaki.rollout.histogram import Histogram, Interval, merge_histograms
from niwaki.rollout.sequential import certainly_above, certainly_below, confidence_band, excess, shortfall
from niwaki.rollout.signals import SIGNALS

# At 100 % the only pairs are with the last answers of dense. A few of them must not block the promotion.
MIN_PAIRS = 20
Action = Literal["hold", "widen", "return"]


class Policy(BaseModel):
    """Policy of a roll-out: shares of traffic, and the evidence that a step needs before the next.

    An interval ends after `interval_s` and `min_requests` of the canary, at the later of both. Limits are checked every
    `interval_s` in any case. Example: 500 requests per interval, 2 % errors, a limit of 0.2 %. Two intervals miss that
    with a probability of 0.5 % (10 of 1000 requests must fail).
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
    """Result of one signal: number of observations (`seen`), its centre with a confidence band, and its limit."""

    signal: str
    limit: float
    seen: int
    value: float | None
    low: float | None
    high: float | None
    broken: bool
    kept: bool

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON, for the store and the dashboard."""
        return dict(vars(self))


@dataclass(frozen=True)
class Verdict:
    """Action with its reason in a sentence and its findings."""

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
    """Decide from the intervals of one roll-out, oldest first. Only intervals from `since` on prove quality (drift)."""
    findings = tuple(assess(policy, limits, intervals, name, since) for name in limits)
    broken = [finding for finding in findings if finding.broken]
    if broken:
        return Verdict("return", "; ".join(_broken_text(finding) for finding in broken), findings)
    missing = [*_missing(policy, step, intervals, findings), *_worse(limits, step, intervals)]
    if missing:
        return Verdict("hold", "; ".join(missing), findings)
    return Verdict("widen", "every limit is kept", findings)


def assess(
    policy: Policy, limits: Mapping[str, float], intervals: Sequence[Interval], name: str, since: int = 1
) -> Finding:
    """Return the finding of one signal."""
    signal, limit = SIGNALS[name], limits[name]
    histograms = [interval.histogram(name) for interval in intervals]
    whole, at = merge_histograms(histograms), signal.scaled(limit)
    if not whole.total:
        return Finding(name, limit, 0, None, None, None, broken=False, kept=False)
    upper, first, tests = signal.limit == "max", intervals[0].number, len(limits)
    threshold = math.log(tests / (1 - policy.confidence))
    against = (excess if upper else shortfall)(histograms, at, signal.centre, first)
    counted = [interval.histogram(name) for interval in intervals if interval.number >= since]
    in_favour = (certainly_below if upper else certainly_above)(counted, at, signal.centre)
    low, high = confidence_band(histograms, signal.centre, policy.confidence)
    centre = whole.mean if signal.centre == "mean" else whole.median
    return Finding(
        name, limit, whole.total, signal.value(centre), signal.value(low), signal.value(high),
        broken=against >= threshold, kept=in_favour >= threshold,
    )  # fmt: skip


def requests_of(step: int, intervals: Sequence[Interval]) -> int:
    """Return the number of requests of the canary at this step, failures and shadow copies included."""
    return sum(interval.histogram("error_rate").total for interval in intervals if interval.step == step)


def _missing(policy: Policy, step: int, intervals: Sequence[Interval], findings: Sequence[Finding]) -> list[str]:
    requests = requests_of(step, intervals)
    missing = [] if requests >= policy.min_requests else [f"{requests} of {policy.min_requests} requests at this step"]
    quality = [finding for finding in findings if SIGNALS[finding.signal].proved]
    if quality:
        own: list[Histogram] = [i.histogram(quality[0].signal) for i in intervals if i.step == step]
        audits = merge_histograms(own).total
        missing += [] if audits >= policy.min_audits else [f"{audits} of {policy.min_audits} audits at this step"]
    missing += [
        f"{one.signal} is not yet certain to keep {one.limit:g} ({_band_text(one)})" for one in quality if not one.kept
    ]
    return missing


def _worse(limits: Mapping[str, float], step: int, intervals: Sequence[Interval]) -> list[str]:
    """Return the limits that the values of this step do not keep, certain or not."""
    broken = []
    for name, limit in limits.items():
        signal = SIGNALS[name]
        own = merge_histograms(interval.histogram(name) for interval in intervals if interval.step == step)
        if own.total < (MIN_PAIRS if signal.centre == "median" else 1):
            continue
        value = signal.value(own.mean if signal.centre == "mean" else own.median)
        if (value > limit) if signal.limit == "max" else (value < limit):
            broken.append(f"{name} was {value:.4g} at this step, the limit is {limit:g}")
    return broken


def _broken_text(finding: Finding) -> str:
    side = "above" if SIGNALS[finding.signal].limit == "max" else "below"
    band = _band_text(finding)
    return f"{finding.signal} is certainly {side} {finding.limit:g} (since the start of the roll-out {band})"


def _band_text(finding: Finding) -> str:
    if finding.value is None:
        return "no observation"
    return f"{finding.value:.4g}, {finding.low:.4g} to {finding.high:.4g} from {finding.seen}"
