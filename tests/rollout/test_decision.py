"""The decision, by cases and by simulated roll-outs."""

import numpy as np
import pytest
from pydantic import ValidationError

from niwaki.measure.metrics import METRICS
from niwaki.rollout.decision import Policy, assess, decide, requests_of
from niwaki.rollout.histogram import Interval
from niwaki.rollout.signals import SIGNALS

POLICY = Policy()
LIMITS = {
    "error_rate": 0.002, "prefill_latency_ratio": 1.5, "decode_latency_ratio": 1.5, "top1_agreement": 0.9,
    "perplexity_ratio": 1.1,
}  # fmt: skip


def interval(number: int, step: int = 0, **seen: list[float]) -> Interval:
    found = Interval(number, step, 60.0 * number)
    for name, values in seen.items():
        for value in values:
            found.observe(name, SIGNALS[name].scaled(value))
    return found


def good(number: int, step: int = 0) -> Interval:
    return interval(
        number, step, error_rate=[0.0] * 500, decode_latency_ratio=[1.0] * 100, prefill_latency_ratio=[1.0] * 100,
        top1_agreement=[1.0] * 60, perplexity_ratio=[1.0] * 60,
    )  # fmt: skip


def test_names_are_those_of_compare_and_turn_the_same_way() -> None:
    shared = SIGNALS.keys() & METRICS.keys()
    assert shared == {"prefill_latency_ratio", "decode_latency_ratio", "top1_agreement", "perplexity_ratio"}
    assert all(SIGNALS[name].limit == METRICS[name].limit for name in shared)


def test_nothing_seen_is_no_reason_to_widen() -> None:
    verdict = decide(POLICY, LIMITS, 0, [Interval(1, 0, 0.0)])
    assert verdict.action == "hold" and "0 of 500 requests at this step" in verdict.reason
    assert "0 of 30 audits" in verdict.reason and "top1_agreement is not yet certain to keep 0.9" in verdict.reason


def test_evidence_for_every_limit_widens() -> None:
    found = [good(1), good(2)]
    assert decide(POLICY, LIMITS, 0, found).action == "widen"
    assert decide(POLICY, LIMITS, 1, found).reason == "0 of 500 requests at this step; 0 of 30 audits at this step"
    assert requests_of(0, found) == 1000


def test_after_drift_quality_is_proved_anew() -> None:
    found = [good(1), good(2), interval(3, 0, error_rate=[0.0] * 500, top1_agreement=[1.0] * 3)]
    verdict = decide(POLICY, LIMITS, 0, found, since=3)
    assert verdict.action == "hold" and "top1_agreement is not yet certain to keep 0.9" in verdict.reason
    assert decide(POLICY, LIMITS, 0, [*found, good(4), good(5)], since=3).action == "widen"
    bad = [*found, interval(4, 0, top1_agreement=[0.5] * 30)]
    assert decide(POLICY, LIMITS, 0, bad, since=5).action == "return"  # evidence against counts all the same


@pytest.mark.parametrize(
    ("name", "values", "side"),
    [
        ("error_rate", [1.0] * 12 + [0.0] * 288, "above 0.002"),
        ("decode_latency_ratio", [2.0] * 60, "above 1.5"),
        ("prefill_latency_ratio", [2.0] * 60, "above 1.5"),
        ("top1_agreement", [0.7, 0.8] * 15, "below 0.9"),
        ("perplexity_ratio", [1.4] * 80, "above 1.1"),
    ],
)
def test_each_limit_alone_returns(name: str, values: list[float], side: str) -> None:
    bad = good(3)
    bad.histograms[name] = interval(3, 0, **{name: values}).histograms[name]
    verdict = decide(POLICY, LIMITS, 0, [good(1), good(2), bad])
    assert verdict.action == "return" and verdict.reason.startswith(f"{name} is certainly {side}")
    assert [one.signal for one in verdict.findings if one.broken] == [name]


def test_a_few_bad_values_are_not_certain() -> None:
    few = interval(1, 0, error_rate=[1.0] + [0.0] * 99, top1_agreement=[0.5, 1.0, 1.0])
    assert decide(POLICY, LIMITS, 0, [few]).action == "hold"


def test_what_is_worse_but_not_certainly_so_is_not_widened() -> None:
    worse = good(2, step=1)
    worse.histograms["error_rate"] = interval(2, 1, error_rate=[1.0] * 3 + [0.0] * 497).histograms["error_rate"]
    verdict = decide(POLICY, LIMITS, 1, [good(1), worse])
    assert (verdict.action, verdict.reason) == ("hold", "error_rate was 0.006 at this step, the limit is 0.002")


def test_a_last_pair_does_not_hold_up_the_last_step() -> None:
    """An answer of dense that ends after the share went to 100 % makes a pair, and no other follows it."""
    last = [
        good(1),
        good(2),
        interval(3, 1, error_rate=[0.0] * 500, top1_agreement=[1.0] * 30, decode_latency_ratio=[4.0]),
    ]
    assert decide(POLICY, LIMITS, 1, last).action == "widen"
    last[2].histograms["decode_latency_ratio"] = interval(3, 1, decode_latency_ratio=[4.0, 1.0] * 10).histograms[
        "decode_latency_ratio"
    ]
    assert decide(POLICY, LIMITS, 1, last).action == "widen"  # the lower median keeps the limit
    last[2].observe("decode_latency_ratio", SIGNALS["decode_latency_ratio"].scaled(4.0))
    verdict = decide(POLICY, LIMITS, 1, last)
    assert verdict.action == "hold" and "decode_latency_ratio was 4" in verdict.reason


def test_a_finding_tells_value_and_band_in_the_units_of_the_signal() -> None:
    one = assess(POLICY, LIMITS, [good(1)], "decode_latency_ratio")
    assert one.value == pytest.approx(1.0) and one.seen == 100
    assert one.low is not None and one.high is not None and one.low < 1 < one.high < 1.05
    nothing = assess(POLICY, LIMITS, [Interval(1, 0, 0.0)], "error_rate")
    assert (nothing.seen, nothing.value, nothing.broken, nothing.kept) == (0, None, False, False)


@pytest.mark.parametrize("steps", [(), (0.5, 0.1), (0.5, 0.5), (0.1, 1.1), (-0.1, 1.0)])
def test_steps_have_to_rise(steps: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="shares from 0 to 1"):
        Policy(steps=steps)


def rolled_out(
    seed: int, *, errors: float = 0.0, slow: float = 1.0, agreement: float = 0.97, from_interval: int = 1
) -> tuple[str, int]:
    """(how it ended, after which interval) of a roll-out whose canary turns bad at an interval."""
    rng, step, seen = np.random.default_rng(seed), 0, []
    for number in range(1, 41):
        bad = number >= from_interval
        drawn = rng.random(500) < (errors if bad else 0.0)
        spread = np.exp(rng.normal(0, 0.3, 100) - rng.normal(0, 0.3, 100)) * (slow if bad else 1.0)
        mean = agreement if bad else 0.97
        seen.append(
            interval(
                number, step, error_rate=drawn.astype(float).tolist(), decode_latency_ratio=spread.tolist(),
                top1_agreement=rng.beta(20 * mean, 20 * (1 - mean), 40).tolist(),
                perplexity_ratio=np.exp(rng.normal(0.02, 0.1, 40)).tolist(),
            )
        )  # fmt: skip
        verdict = decide(POLICY, LIMITS, step, seen)
        if verdict.action == "return":
            return "returned", number
        if verdict.action == "widen":
            step += 1
        if step == len(POLICY.steps):
            return "promoted", number
    return "held", 40


def test_an_equal_canary_is_promoted_and_not_returned() -> None:
    ends = [rolled_out(seed)[0] for seed in range(8)]
    assert ends.count("promoted") == 8


@pytest.mark.parametrize("wrong", [{"errors": 0.02}, {"slow": 2.0}, {"agreement": 0.7}])
@pytest.mark.parametrize("from_interval", [1, 4])
def test_a_bad_canary_is_returned_within_two_intervals(wrong: dict[str, float], from_interval: int) -> None:
    ends = [rolled_out(seed, from_interval=from_interval, **wrong) for seed in range(6)]  # type: ignore[arg-type]
    assert [how for how, _ in ends] == ["returned"] * 6
    assert all(number <= from_interval + 1 for _, number in ends)
